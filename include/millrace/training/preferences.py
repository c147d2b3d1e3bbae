"""Preference sets: two answers to one question, and which of them users find better. From corrections of wrong answers,
and from answers to the same question that were rated clearly differently.

The same rules as of training sets (`sets.py`): prompted as the release prompts, nothing that the gate will ask, an id
that is the hash of the examples. Knows nothing of how it is trained on.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import TrainingError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_PREFERENCE_EXAMPLES, SILVER_DOCUMENTS, SILVER_FEEDBACK
from millrace.releases.pipeline import MAX_QUESTION
from millrace.releases.prompt import render
from millrace.settings import Settings
from millrace.sources.erased import erasures_seen, require_nobody_erased
from millrace.sources.questions import derive_questions
from millrace.training.pool import LOW_RATING, MAX_CORRECTION, held_out_questions, same_words
from millrace.training.sets import MINIMUM, refuse_near, retrieval, take
from millrace.training.starting import starting_manifest

CLEARLY = 0.5
"""Between the mean ratings of two answers to a question, so that one of them is taken to be better."""
PREFIX = "prefer-"


@dataclass(frozen=True)
class Compared:
    """Two answers to a question, before it has a prompt."""

    question: str
    chosen: str
    rejected: str
    origin: Literal["correction", "ratings"]
    simulated: bool

    @property
    def example_id(self) -> str:
        return content_hash(self.question, self.chosen, self.rejected)


@dataclass(frozen=True)
class PreferenceExample:
    """One row of a preference set."""

    example_id: str
    origin: str
    simulated: bool
    question: str
    chosen: str
    rejected: str
    chunk_ids: tuple[str, ...]
    prompt: str
    """The user message that the release would send to its generator."""

    @property
    def learnt(self) -> dict[str, str]:
        """What the training program is given; the question is for whoever erases a user."""
        return {"question": self.question, "prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


def build_preference_set(
    settings: Settings, application: Application, *, run: str, max_examples: int | None = None
) -> dict[str, Any]:
    """Write the preference set that feedback and the current index give; the same input, the same set.

    Args:
        max_examples: instead of the declared `training.max_examples`.

    Returns:
        `training_set`; counts `examples`, `corrections`, `simulated`; `left_out` (reason → count); `index_build`;
        `changed`.

    Raises:
        TrainingError: fewer than 8 examples.
        RetrievalError: there is no index build.
        ReleaseError: MLflow doesn't answer.
    """
    lake = Lake.of(settings, application.name)
    erased = erasures_seen(lake)
    manifest = starting_manifest(settings, application, run=run)
    held_out = held_out_questions(lake, derive_questions(lake.read(SILVER_DOCUMENTS), application))
    retrieve, build = retrieval(settings, application, manifest)

    def prompted(compared: Compared) -> PreferenceExample:
        hits = retrieve(compared.question)
        return PreferenceExample(
            example_id=compared.example_id,
            **asdict(compared),
            chunk_ids=tuple(hit.chunk_id for hit in hits),
            prompt=render(manifest.prompt.template, compared.question, hits),
        )

    # By hash, so that what is chosen hardly changes when there is more.
    ranked = sorted(set(preferences(lake.read(SILVER_FEEDBACK))), key=lambda compared: compared.example_id)
    examples, left_out = take(ranked, held_out, prompted, max_examples or application.training.max_examples)
    if len(examples) < MINIMUM:
        raise TrainingError(
            f"application {application.name!r}: {len(examples)} pairs of a better and a worse answer, at least "
            f"{MINIMUM} are needed (left out: {left_out or 'none'}); gather corrections of wrong answers, or ratings "
            "of different answers to the same question"
        )
    refuse_near([example.question for example in examples], held_out)
    set_id = preference_set_id(examples)
    rows = [{"training_set": set_id} | asdict(example) for example in examples]
    require_nobody_erased(lake, erased)
    written = lake.merge(
        GOLD_PREFERENCE_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_PREFERENCE_EXAMPLES.rows_schema), run=run
    )
    return {
        "training_set": set_id,
        "examples": len(examples),
        "corrections": sum(example.origin == "correction" for example in examples),
        "simulated": sum(example.simulated for example in examples),
        "left_out": left_out,
        "index_build": build,
        "changed": written.changed,
    }


def read_preference_set(lake: Lake, set_id: str) -> list[PreferenceExample]:
    """The examples of a set, in the order of their ids.

    Raises:
        TrainingError: there is no such set, or its rows are not those that its id was made from.
    """
    columns = [name for name in GOLD_PREFERENCE_EXAMPLES.rows_schema.names if name != "training_set"]
    rows = lake.read(GOLD_PREFERENCE_EXAMPLES, columns, where=pc.field("training_set") == set_id)
    examples = [
        PreferenceExample(**row | {"chunk_ids": tuple(row["chunk_ids"])})
        for row in rows.sort_by("example_id").to_pylist()
    ]
    if not examples or preference_set_id(examples) != set_id:
        raise TrainingError(
            f"preference set {set_id} has {len(examples)} rows in gold/preference_examples and they don't give its id; "
            "build a set with build_preference_set and use the id that it returns"
        )
    return examples


def preferences(feedback: pa.Table) -> Iterator[Compared]:
    """Of each question at most two: the latest correction before the answer that it corrects, and the best rated
    answer before the worst rated one, where users tell them clearly apart."""
    corrected: dict[str, Compared] = {}
    rated: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in feedback.sort_by([("occurred_at", "ascending"), ("completion_id", "ascending")]).to_pylist():
        question, answer = row["question"].strip(), (row["answer"] or "").strip()
        if not 0 < len(question) <= MAX_QUESTION or not answer:
            continue
        key = same_words(question)
        rated[key][same_words(answer)].append(row | {"question": question, "answer": answer})
        correction = (row["correction"] or "").strip()
        if (
            row["rating"] < LOW_RATING
            and 0 < len(correction) <= MAX_CORRECTION
            and same_words(correction) != same_words(answer)
        ):
            corrected[key] = Compared(question, correction, answer, "correction", row["simulated"])
    yield from corrected.values()
    for answers in rated.values():
        ranked = sorted(answers.values(), key=lambda rows: (fmean(row["rating"] for row in rows), rows[0]["answer"]))
        worst, best = ranked[0], ranked[-1]
        if fmean(row["rating"] for row in best) - fmean(row["rating"] for row in worst) >= CLEARLY:
            simulated = any(row["simulated"] for row in [*best, *worst])
            yield Compared(best[-1]["question"], best[-1]["answer"], worst[-1]["answer"], "ratings", simulated)


def is_preference_set(set_id: str) -> bool:
    return set_id.startswith(PREFIX)


def preference_set_id(examples: Sequence[PreferenceExample]) -> str:
    """`prefer-` and 16 hexadecimal digits, of the examples whatever their order."""
    content = sorted(json.dumps(asdict(example), sort_keys=True) for example in examples)
    return f"{PREFIX}{content_hash(*content)[:16]}"
