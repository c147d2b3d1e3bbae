"""What `millrace status` says of each application: who answers, what was decided last, how the last runs went."""

from typing import Any

from millrace.airflow_api import Airflow
from millrace.applications import load_applications
from millrace.lakehouse.lake import Lake
from millrace.rollout.decisions import fold, read_journal
from millrace.settings import Settings


def overview(settings: Settings, airflow: Airflow | None) -> dict[str, dict[str, Any]]:
    """Application → `champion`, `challenger`, `share`, `split`, `frozen`, `last_decision`, `last_runs`.

    Works with the stack down: it reads the journal, which the split follows. Without Airflow, no runs.
    """
    return {a.name: _one(settings, a.name, airflow) for a in load_applications(settings)}


def _one(settings: Settings, name: str, airflow: Airflow | None) -> dict[str, Any]:
    journal = read_journal(Lake.of(settings, name))
    state = fold(journal)
    last = journal[-1].model_dump(mode="json", exclude={"evidence"}) if journal else None
    return {
        "champion": state.champion,
        "challenger": state.challenger,
        "share": state.share,
        "frozen": state.frozen,
        "split": state.split().model_dump(mode="json") if state.champion else None,
        "last_decision": last,
        "last_runs": _last_runs(airflow, name) if airflow else [],
    }


def _last_runs(airflow: Airflow, name: str) -> list[dict[str, Any]]:
    """The latest run of each of the application's DAGs."""
    latest = {run.dag_id: run for run in airflow.runs("~") if run.dag_id.startswith(f"{name}.")}
    return [
        {"dag": run.dag_id, "run": run.run_id, "state": run.state, "started": run.start}
        for run in sorted(latest.values(), key=lambda run: run.dag_id)
    ]
