"""Evaluations as MLflow runs, for people to compare there. Nothing is decided by them: the tables are the truth."""

from typing import Any

from millrace.errors import ReleaseError
from millrace.settings import Settings

EVALUATION_TAG = "millrace.evaluation_id"


def log_evaluation(settings: Settings, application: str, evaluation: dict[str, Any]) -> None:
    """One finished run in experiment `<application>/evaluations` for `evaluation`, however often it is logged.

    Args:
        evaluation: as `gate.evaluate_candidate` returns it.

    Raises:
        ReleaseError: MLflow doesn't answer, or refuses.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.utils.time import get_current_time_millis

    client = MlflowClient(settings.mlflow_url)
    try:
        experiment = _experiment(client, f"{application}/evaluations")
        evaluation_id = evaluation["evaluation_id"]
        found = client.search_runs([experiment], f"tags.`{EVALUATION_TAG}` = '{evaluation_id}'")
        if any(run.info.status == "FINISHED" for run in found):
            return
        # A run that a killed task left behind is finished instead of left beside a second one.
        run_id = (
            found[0].info.run_id
            if found
            else client.create_run(
                experiment,
                tags={EVALUATION_TAG: evaluation_id, "verdict": evaluation["verdict"]},
                run_name=f"{evaluation['candidate']} against {evaluation['champion']}: {evaluation['verdict']}",
            ).info.run_id
        )
        names = ("evaluation_set", "champion", "candidate", "index_build")
        now = get_current_time_millis()
        client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, 0) for name, value in _metrics(evaluation["criteria"])],
            params=[Param(name, evaluation[name]) for name in names],
        )
        client.set_terminated(run_id)
    except MlflowException as error:
        raise ReleaseError(
            f"the evaluation could not be logged to MLflow at {settings.mlflow_url}: {error}; is it up "
            "(`millrace status`)? The evaluation itself is kept, run the task again"
        ) from None


def _metrics(criteria: list[dict[str, Any]]) -> list[tuple[str, float]]:
    fields = ("champion", "candidate", "estimate", "low", "high", "bound", "passed")
    return [
        (f"{criterion['name']}.{field}", float(criterion[field]))
        for criterion in criteria
        for field in fields
        if criterion[field] is not None
    ]


def _experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found:  # another run created it in between
            return str(found.experiment_id)
        raise
