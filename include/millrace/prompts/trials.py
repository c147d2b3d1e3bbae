"""Trials as rows of `ops/prompt_trials`: what a killed study goes on from, and what a finished one is read from."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_PROMPT_TRIALS
from millrace.prompts.space import Point
from millrace.prompts.study import Trial

Part = Literal["search", "held_out"]


def read_trials(lake: Lake, study: str, part: Part) -> dict[int, Trial]:
    """The kept trials of a study: number → trial, in order."""
    where = (pc.field("study") == study) & (pc.field("part") == part)
    rows = lake.read(OPS_PROMPT_TRIALS, where=where).sort_by("trial").to_pylist()
    return {row["trial"]: _trial(row) for row in rows}


def read_template(lake: Lake, study: str, trial: int) -> str | None:
    """The whole template of a trial; None: there is no such trial."""
    where = (pc.field("study") == study) & (pc.field("part") == "search") & (pc.field("trial") == trial)
    rows = lake.read(OPS_PROMPT_TRIALS, ["template"], where=where).to_pylist()
    return str(rows[0]["template"]) if rows else None


def keep_trial(
    lake: Lake, study: str, part: Part, trial: Trial, *, template: str, about: Mapping[str, str], run: str
) -> None:
    """Write one trial. What was written stays: a repeat that answered again changes nothing.

    Args:
        about: `champion_release_id` and `index_build`.
    """
    row = {
        "study": study,
        "part": part,
        "trial": trial.number,
        "parameters": json.dumps(asdict(trial.point)),
        "template": template,
        "state": trial.state,
        "questions": len(trial.scores),
        "token_f1": trial.mean if trial.scores else None,
        "prompt_tokens": trial.prompt_tokens,
        "completion_tokens": trial.completion_tokens,
        "seconds": trial.seconds,
        "scores": json.dumps(dict(trial.scores)),
        "why": trial.why,
        "ended_at": datetime.now(UTC),
        **about,
    }
    lake.merge(OPS_PROMPT_TRIALS, pa.Table.from_pylist([row], schema=OPS_PROMPT_TRIALS.rows_schema), run=run)


def _trial(row: dict[str, Any]) -> Trial:
    return Trial(
        number=row["trial"],
        point=Point(**json.loads(row["parameters"])),
        state=row["state"],
        scores=json.loads(row["scores"]),
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        seconds=row["seconds"],
        why=row["why"],
    )
