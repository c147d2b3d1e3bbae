"""The stage, with a lake on disk, MLflow on SQLite and the program in two processes."""

import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.errors import TrainingError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES
from millrace.settings import Settings
from millrace.training import finetune as stage
from millrace.training.finetune import finetune
from millrace.training.sets import Example, training_set_id


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With MLflow in a file of its own."""
    settings.home.mkdir(parents=True)
    return Settings(**settings.model_dump() | {"mlflow_uri": f"sqlite:///{settings.home}/mlflow.db"})


@pytest.fixture
def tiny(qa: Application) -> Application:
    training = {"lora_layers": 2, "lora_rank": 4, "epochs": 2, "max_tokens": 200}
    return qa.model_copy(update={"training": qa.training.model_copy(update=training)})


@pytest.fixture
def training_set(lake: Lake, examples: list[dict[str, str]]) -> str:
    rows = [
        Example(str(i), "document", i == 0, "api", e["prompt"], e["answer"], ("chunk",), e["prompt"])
        for i, e in enumerate(examples)
    ]
    set_id = training_set_id(rows)
    table = pa.Table.from_pylist(
        [{"training_set": set_id, **vars(row)} for row in rows], schema=GOLD_TRAINING_EXAMPLES.rows_schema
    )
    lake.merge(GOLD_TRAINING_EXAMPLES, table, run="test")
    return set_id


@pytest.mark.model
def test_a_fine_tune_is_shown_in_mlflow_and_is_not_done_twice(
    settings: Settings, tiny: Application, training_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    first = finetune(settings, tiny, training_set=training_set, run="first")
    assert first["changed"]
    assert (first["steps"], first["left_out"], first["simulated"]) == (4, 0, 1)

    client = MlflowClient(settings.mlflow_url)
    logged = client.get_run(first["mlflow_run"])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["training_set"] == training_set
    assert logged.data.tags["simulated"] == "true"
    curve = client.get_metric_history(first["mlflow_run"], "loss")
    assert sorted(point.step for point in curve) == [1, 2, 3, 4]
    assert logged.data.metrics["held_out_loss"] == pytest.approx(first["held_out_loss"])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(stage, "run_program", refuse)
    again = finetune(settings, tiny, training_set=training_set, run="again")
    assert again == first | {"changed": False}


def test_an_unknown_set_is_refused(settings: Settings, tiny: Application, lake: Lake) -> None:
    with pytest.raises(TrainingError, match="training set train-0 has 0 rows"):
        finetune(settings, tiny, training_set="train-0", run="test")


def test_a_misspelt_deepspeed_key_in_a_declaration_is_refused(
    settings: Settings, tiny: Application, training_set: str
) -> None:
    training = tiny.training.model_copy(update={"deepspeed": {"zero_optimisation": {"stage": 2}}})
    with pytest.raises(TrainingError, match=r"\[training\] is wrong: zero_optimisation: Extra inputs"):
        finetune(settings, tiny.model_copy(update={"training": training}), training_set=training_set, run="test")


def test_only_the_last_fine_tunes_stay_on_disk(settings: Settings) -> None:
    import os

    runs = settings.home / "training" / "dev" / "qa"
    for age, name in enumerate(("newest", "middle", "oldest")):
        (runs / name).mkdir(parents=True)
        os.utime(runs / name, (1000 - age, 1000 - age))
    stage._forget(runs, keep=2)
    assert {path.name for path in runs.iterdir()} == {"newest", "middle"}


def test_an_unreachable_mlflow_is_said_at_once(settings: Settings, tiny: Application, training_set: str) -> None:
    away = Settings(**settings.model_dump() | {"mlflow_uri": "http://127.0.0.1:9"})
    with pytest.raises(TrainingError, match="MLflow at http://127.0.0.1:9 doesn't answer"):
        finetune(away, tiny, training_set=training_set, run="test")
