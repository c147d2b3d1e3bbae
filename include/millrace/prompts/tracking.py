"""A study as MLflow runs, one for the study and under it one a trial, in experiment `<application>/prompts`.

For people to compare there; nothing is decided by them: `ops/prompt_trials` is the truth.
"""

from dataclasses import asdict
from typing import Any

from millrace.prompts.study import Outcome, Trial
from millrace.releases.mlflow_server import ensure_experiment, mlflow_client
from millrace.settings import Settings

STUDY_TAG = "millrace.study"
TRIAL_TAG = "millrace.trial"
PARENT_TAG = "mlflow.parentRunId"


def log_study(settings: Settings, application: str, result: dict[str, Any], outcome: Outcome, *, run: str) -> None:
    """Log a finished study, however often it is asked for, once.

    Args:
        result: as `optimize.optimize_prompt` returns it.

    Raises:
        ReleaseError: MLflow doesn't answer, or refuses.
    """
    study = result["study"]
    with mlflow_client(settings, f"log study {study} (its trials are kept; run the task again)") as client:
        from mlflow.entities import Metric, Param
        from mlflow.utils.time import get_current_time_millis

        experiment = ensure_experiment(client, f"{application}/prompts")
        found = client.search_runs([experiment], f"tags.`{STUDY_TAG}` = '{study}'", max_results=1000)
        parents = [one for one in found if TRIAL_TAG not in one.data.tags]
        if any(one.info.status == "FINISHED" for one in parents):
            return
        # A run that a killed task left behind is finished instead of left beside a second one.
        tags = {STUDY_TAG: study, "written_by": run, "verdict": result["verdict"], "why": result["why"][:5000]}
        name = f"{study}: {result['verdict']}"
        parent = (parents or [client.create_run(experiment, tags=tags, run_name=name)])[0].info.run_id
        now = get_current_time_millis()
        logged = {one.data.tags[TRIAL_TAG] for one in found if one.info.status == "FINISHED" and one not in parents}
        for trial in outcome.trials:
            if str(trial.number) in logged:
                continue
            child = client.create_run(
                experiment,
                tags={
                    STUDY_TAG: study,
                    TRIAL_TAG: str(trial.number),
                    PARENT_TAG: parent,
                    "state": trial.state,
                    "why": trial.why[:5000],
                },
                run_name=f"trial {trial.number}: {trial.state}",
            ).info.run_id
            client.log_batch(
                child,
                metrics=[Metric(metric, float(value), now, 0) for metric, value in _metrics(trial)],
                params=[Param(name, str(value)) for name, value in asdict(trial.point).items()],
            )
            client.set_terminated(child)
        numbers = ("trials", "tokens", "start_token_f1", "best_token_f1", "estimate", "low", "high")
        steps = [Metric("token_f1", trial.mean, now, trial.number) for trial in outcome.trials if trial.scores]
        totals = [Metric(key, float(result[key]), now, 0) for key in numbers if result[key] is not None]
        about = {key: result[key] for key in ("champion", "index_build", "seen")}
        best = {f"best.{key}": value for key, value in result["best"].items()}
        client.log_batch(
            parent,
            metrics=[*steps, *totals],
            params=[Param(key, str(value)) for key, value in (about | best).items()],
        )
        client.set_terminated(parent)


def _metrics(trial: Trial) -> list[tuple[str, float]]:
    return [
        ("token_f1", trial.mean),
        ("questions", len(trial.scores)),
        ("tokens", trial.tokens),
        ("seconds", trial.seconds),
    ]
