"""Evaluations as MLflow runs, for people to compare there. Nothing is decided by them: the tables are the truth."""

from typing import Any

from millrace.releases.mlflow_server import ensure_experiment, evaluations_experiment, mlflow_client
from millrace.settings import Settings

EVALUATION_TAG = "millrace.evaluation_id"


def log_evaluation(settings: Settings, application: str, evaluation: dict[str, Any]) -> None:
    """One finished run in experiment `<application>/evaluations` for `evaluation`, however often it is logged.

    Args:
        evaluation: as `gate.evaluate_candidate` returns it.

    Raises:
        ReleaseError: MLflow doesn't answer, or refuses.
    """
    evaluation_id, verdict = evaluation["evaluation_id"], evaluation["verdict"]
    with mlflow_client(settings, f"log evaluation {evaluation_id} (it is kept; run the task again)") as client:
        from mlflow.entities import Metric, Param
        from mlflow.utils.time import get_current_time_millis

        experiment = ensure_experiment(client, evaluations_experiment(application))
        found = client.search_runs([experiment], f"tags.`{EVALUATION_TAG}` = '{evaluation_id}'")
        if any(run.info.status == "FINISHED" for run in found):
            return
        # A run that a killed task left behind is finished instead of left beside a second one.
        unfinished = found or [
            client.create_run(
                experiment,
                tags={EVALUATION_TAG: evaluation_id, "verdict": verdict},
                run_name=f"{evaluation['candidate']} against {evaluation['champion']}: {verdict}",
            )
        ]
        run_id = unfinished[0].info.run_id
        now = get_current_time_millis()
        names = ("evaluation_set", "champion", "candidate", "index_build")
        client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, 0) for name, value in _metrics(evaluation["criteria"])],
            params=[Param(name, evaluation[name]) for name in names],
        )
        client.set_terminated(run_id)


def _metrics(criteria: list[dict[str, Any]]) -> list[tuple[str, float]]:
    fields = ("champion", "candidate", "estimate", "low", "high", "bound", "passed")
    counts = {"candidate": "count", "passed": "passed"}  # A count beside shares would be drawn as one of them.
    return [
        (f"{criterion['name']}.{name}", float(criterion[field]))
        for criterion in criteria
        for field, name in (counts.items() if criterion["measure"] == "count" else zip(fields, fields, strict=True))
        if criterion[field] is not None
    ]
