"""A study in a real MLflow: one run for the study, one a trial, however often it is logged."""

from dataclasses import replace

from millrace.applications import Application
from millrace.prompts.study import Outcome, Trial
from millrace.prompts.tracking import STUDY_TAG, TRIAL_TAG, log_study
from millrace.scoring.bootstrap import Interval
from millrace.settings import Settings
from tests.prompts.test_trials import TRIALS

BEST = Trial(3, TRIALS[0].point, "complete", {"q9": 1.0, "q1": 1.0, "q5": 1.0}, 150, 50, 2.0, "")
OUTCOME = Outcome((*TRIALS, BEST), BEST, TRIALS[0], BEST, Interval(0.4, 0.1, 0.7), True, "trial 3 is better")


def a_result(study: str) -> dict:
    return {
        "verdict": "better",
        "why": "trial 3 is better",
        "study": study,
        "champion": "1",
        "index_build": "build",
        "trials": 4,
        "tokens": 563,
        "best": {"trial": 3, "template": "copy", "chunks": 2},
        "start_token_f1": 0.6,
        "best_token_f1": 1.0,
        "estimate": 0.4,
        "low": 0.1,
        "high": 0.7,
        "seen": 0,
    }


def test_a_study_is_logged_once_with_a_run_for_each_trial(registry: Settings, application: Application) -> None:
    from mlflow import MlflowClient

    for _ in range(2):
        log_study(registry, application.name, a_result("study-1"), OUTCOME, run="test")
    log_study(
        registry,
        application.name,
        a_result("study-2") | {"estimate": None, "low": None, "high": None, "best_token_f1": None},
        replace(OUTCOME, difference=None),
        run="test",
    )
    client = MlflowClient(registry.mlflow_url)
    experiment = client.get_experiment_by_name(f"{application.name}/prompts").experiment_id
    runs = client.search_runs([experiment], f"tags.`{STUDY_TAG}` = 'study-1'")
    children = {run.data.tags[TRIAL_TAG]: run for run in runs if TRIAL_TAG in run.data.tags}
    (parent,) = [run for run in runs if TRIAL_TAG not in run.data.tags]
    assert (len(runs), set(children)) == (5, {"0", "1", "2", "3"})
    assert all(run.info.status == "FINISHED" for run in runs)
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert children["3"].data.params["template"] == "copy"
    assert children["1"].data.tags["why"] == "it can't be rendered"
    assert (parent.data.tags["verdict"], parent.data.metrics["low"]) == ("better", 0.1)
    assert parent.data.params["best.chunks"] == "2"
    curve = client.get_metric_history(parent.info.run_id, "token_f1")
    assert sorted(point.step for point in curve) == [0, 2, 3]
    assert len(client.search_runs([experiment], f"tags.`{STUDY_TAG}` = 'study-2'")) == 5


def test_a_study_whose_logging_was_killed_is_finished_and_not_logged_beside(
    registry: Settings, application: Application
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(registry.mlflow_url)
    experiment = client.create_experiment(f"{application.name}/prompts")
    half = client.create_run(experiment, tags={STUDY_TAG: "study-1"})
    log_study(registry, application.name, a_result("study-1"), OUTCOME, run="test")
    runs = client.search_runs([experiment], f"tags.`{STUDY_TAG}` = 'study-1'")
    assert [run.info.run_id for run in runs if TRIAL_TAG not in run.data.tags] == [half.info.run_id]
    assert client.get_run(half.info.run_id).info.status == "FINISHED"
