"""`report.json` and `report.html`: what one turn of the loop did, from what it left in the Lakehouse.

It reads and tells; whether the loop did its work is the story's verdict, whose stages it is given.
"""

import os
import platform
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from millrace.applications import Application, pace_differences
from millrace.demo.progress import Stage
from millrace.demo.report_model import (
    ChampionEntry,
    GateEntry,
    Machine,
    PaceDifference,
    Report,
    RolloutEntry,
    StageEntry,
)
from millrace.demo.report_page import render_page
from millrace.demo.report_reading import (
    alert_entries,
    batch_entries,
    breach_entries,
    champion_entries,
    champions,
    cost_lines,
    gate_entry,
    read_evaluations,
    read_exchanges,
    release_metrics,
    rollout_entries,
    rollouts_since,
    study_entries,
)
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import PLATFORM
from millrace.monitoring.cost import costs
from millrace.rollout.decisions import read_journal
from millrace.settings import Settings


def build_report(
    settings: Settings,
    application: Application,
    stages: Sequence[Stage],
    started_at: datetime,
    *,
    memory_peak_bytes: int | None = None,
) -> Report:
    """What happened since `started_at`. Says so where there was nothing; needs neither Airflow nor MLflow.

    Args:
        stages: of the story, in order, in whatever state.
        memory_peak_bytes: of everything that the stack ran, if somebody measured it.

    Raises:
        LakehouseError: a table can't be read.
    """
    lake = Lake.of(settings, application.name)
    journal, evaluations = read_journal(lake), read_evaluations(lake)
    rolling = rollouts_since(journal, started_at)
    earliest = min([started_at, *(decisions[0].decided_at for decisions in rolling.values())])
    exchanges = read_exchanges(lake, earliest)
    judged = [row for row in evaluations if row["evaluated_at"] >= started_at]
    rollouts = rollout_entries(journal, evaluations, exchanges, application, started_at)
    before, after = champion_entries(champions(journal, started_at), evaluations, application)
    told = [StageEntry(name=s.name, state=s.state, seconds=s.elapsed(), detail=s.detail) for s in stages]
    gates = [gate_entry(row) for row in judged]
    return Report(
        application=application.name,
        description=application.description,
        environment=settings.environment,
        pace=settings.pace,
        headline=headline(told, before, after, gates, rollouts),
        simulated_users=any(e["simulated"] for e in exchanges) or any(r.simulated for r in rollouts),
        started_at=started_at,
        finished_at=datetime.now(UTC),
        pace_differences=[
            PaceDifference(field=field, standard=_said(standard), now=_said(now))
            for field, (standard, now) in sorted(pace_differences(settings, application.name).items())
        ],
        stages=told,
        champion_before=before,
        champion_after=after,
        gates=gates,
        rollouts=rollouts,
        batches=batch_entries(lake, started_at),
        studies=study_entries(lake, application, started_at),
        metrics=release_metrics(lake, started_at),
        breaches=breach_entries(lake, started_at),
        alerts=alert_entries(Lake.of(settings, PLATFORM), started_at),
        costs=cost_lines(costs(settings, application, started_at)),
        machine=Machine(
            cores=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            memory_peak_bytes=memory_peak_bytes,
            platform=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
        ),
        code_version=version("millrace"),
    )


def write_report(settings: Settings, report: Report) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into the home, each whole or not at all; their paths."""
    data, page = settings.home / "report.json", settings.home / "report.html"
    _replace(page, render_page(report))
    _replace(data, report.model_dump_json(indent=2) + "\n")
    return data, page


def headline(
    stages: Sequence[StageEntry],
    before: ChampionEntry | None,
    after: ChampionEntry | None,
    gates: Sequence[GateEntry],
    rollouts: Sequence[RolloutEntry],
) -> str:
    """The outcome in one or two sentences; a failed stage comes first."""
    failed = [stage for stage in stages if stage.state == "failed"]
    said = [f"Stage “{failed[0].name}” failed: {failed[0].detail.rstrip('.')}."] if failed else []
    if before and after and before.version != after.version:
        said.append(f"Version {after.version} replaced version {before.version}{_gain(before, after)}.")
    elif after:
        refused = sum(not gate.passed for gate in gates)
        said.append(
            f"Version {after.version} stays champion"
            + (f"; the gate refused {refused} of {len(gates)} candidates." if gates else "; nothing was a candidate.")
        )
    else:
        said.append("There is no champion.")
    said += [
        f"Version {rollout.challenger}{', which the gate had refused,' if rollout.gate_passed is False else ''} was "
        f"rolled back after {rollout.users_on_challenger} of {rollout.users} "
        f"{'simulated users' if rollout.simulated else 'users'} had met it."
        for rollout in rollouts
        if rollout.outcome == "rollback"
    ]
    return " ".join(said)


def _gain(before: ChampionEntry, after: ChampionEntry) -> str:
    if not (before.quality and after.quality):
        return ""
    return (
        f": token-F1 {before.quality.estimate:.2f} → {after.quality.estimate:.2f} on {after.examples} questions that "
        "nobody trained on"
    )


def _said(value: object) -> str:
    """A declared value in words."""
    match value:
        case None:
            return "none"
        case dict():
            return ", ".join(f"{key} {_said(item)}" for key, item in value.items())
        case list() | tuple():
            return "; ".join(_said(item) for item in value)
    return str(value)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
