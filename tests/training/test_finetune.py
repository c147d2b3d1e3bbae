"""The stage, with a lake on disk, MLflow on SQLite and the program in two processes."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from millrace.applications import Application
from millrace.errors import OutOfMemory, ReleaseError, TrainingError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_PREFERENCE_EXAMPLES, GOLD_TRAINING_EXAMPLES, OPS_COSTS
from millrace.releases.declare import declare_release
from millrace.releases.generator import adapter_name
from millrace.releases.loader import ReleaseLoader
from millrace.releases.manifest import ServedModel
from millrace.releases.registry import release_manifest, versions
from millrace.settings import Settings
from millrace.training import finetune as stage
from millrace.training.candidate import release_candidate
from millrace.training.finetune import finetune
from millrace.training.launch import run_program
from millrace.training.preferences import PreferenceExample, preference_set_id
from millrace.training.sets import Example, build_training_set, training_set_id
from millrace.training.spec import Spec
from millrace.upkeep import remove_unused
from tests.engines.servers import KEY, Served, vllm_server
from tests.training.conftest import index


@pytest.fixture
def training_set(settings: Settings, tiny: Application, examples: list[dict[str, str]]) -> str:
    rows = [
        Example(str(i), "document", i == 0, "api", e["prompt"], e["answer"], ("chunk",), e["prompt"])
        for i, e in enumerate(examples)
    ]
    set_id = training_set_id(rows)
    table = pa.Table.from_pylist(
        [{"training_set": set_id, **vars(row)} for row in rows], schema=GOLD_TRAINING_EXAMPLES.rows_schema
    )
    Lake.of(settings, tiny.name).merge(GOLD_TRAINING_EXAMPLES, table, run="test")
    return set_id


@pytest.mark.model
@pytest.mark.timeout(600)
def test_a_fine_tune_is_shown_in_mlflow_and_is_not_done_twice(
    tracked: Settings, tiny: Application, training_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    first = finetune(tracked, tiny, training_set=training_set, run="first")
    assert first["changed"]
    assert (first["steps"], first["left_out"], first["simulated"]) == (4, 0, 1)

    client = MlflowClient(tracked.mlflow_url)
    logged = client.get_run(first["mlflow_run"])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["training_set"] == training_set
    assert logged.data.tags["simulated"] == "true"
    curve = client.get_metric_history(first["mlflow_run"], "loss")
    assert sorted(point.step for point in curve) == [1, 2, 3, 4]
    assert logged.data.metrics["held_out_loss"] == pytest.approx(first["held_out_loss"])
    assert logged.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert logged.data.params["zero_stage"] == "2"
    (used,) = logged.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("gold/training_examples", training_set)
    lake = Lake.of(tracked, tiny.name)
    source = {"path": lake.uri(GOLD_TRAINING_EXAMPLES), "delta_table_version": lake.version(GOLD_TRAINING_EXAMPLES)}
    assert json.loads(used.dataset.source) == source

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(stage, "run_program", refuse)
    again = finetune(tracked, tiny, training_set=training_set, run="again")
    assert again == first | {"changed": False}
    (cost,) = Lake.of(tracked, tiny.name).read(OPS_COSTS).to_pylist()
    assert (cost["stage"], cost["subject"], cost["release_id"]) == ("training", first["fingerprint"], None)
    assert cost["cost_usd"] == pytest.approx(first["seconds"] / 3600 * tiny.prices.training_hour)


def test_an_unknown_set_is_refused(settings: Settings, tiny: Application) -> None:
    with pytest.raises(TrainingError, match="training set train-0 has 0 rows"):
        finetune(settings, tiny, training_set="train-0", run="test")


def test_a_misspelt_deepspeed_key_in_a_declaration_is_refused(
    settings: Settings, tiny: Application, training_set: str
) -> None:
    training = tiny.training.model_copy(update={"deepspeed": {"zero_optimisation": {"stage": 2}}})
    with pytest.raises(TrainingError, match=r"\[training\] is wrong: zero_optimisation: Extra inputs"):
        finetune(settings, tiny.model_copy(update={"training": training}), training_set=training_set, run="test")


def test_where_a_server_can_only_be_given_adapters_training_all_weights_is_refused(
    settings: Settings, tiny: Application, training_set: str
) -> None:
    served = settings.model_copy(update={"upstream_url": "http://127.0.0.1:9/v1", "upstream_model": "small"})
    full = tiny.model_copy(update={"training": tiny.training.model_copy(update={"lora_rank": 0, "lora_layers": 0})})
    with pytest.raises(TrainingError, match="the server of 'small'"):
        finetune(served, full, training_set=training_set, run="test")


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(600)
def test_where_memory_is_short_micro_batches_get_smaller_and_stay_so(
    tracked: Settings, tiny: Application, training_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tiny.training.model_copy(update={"micro_batch": 2, "gradient_accumulation": 1, "epochs": 1})
    wide = tiny.model_copy(update={"training": training})
    tried: list[int] = []

    def short_of_memory(spec: Spec, **options: Any) -> None:
        tried.append(spec.micro_batch)
        if spec.micro_batch > 1 or len(tried) == 2:
            # The first one is refused; the second is killed, as by a reboot.
            spec.folder.joinpath("spec.json").write_text(spec.model_dump_json())
            raise OutOfMemory("out of memory") if spec.micro_batch > 1 else KeyboardInterrupt
        run_program(spec, **options)

    monkeypatch.setattr(stage, "run_program", short_of_memory)
    with pytest.raises(KeyboardInterrupt):
        finetune(tracked, wide, training_set=training_set, run="test")
    assert finetune(tracked, wide, training_set=training_set, run="again")["steps"] == 2
    assert tried == [2, 1, 1]


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(600)
def test_a_preference_set_is_learnt_by_dpo(
    tracked: Settings, tiny: Application, examples: list[dict[str, str]]
) -> None:
    from mlflow import MlflowClient

    rows = [
        PreferenceExample(str(i), "correction", True, e["prompt"], e["answer"], "No idea.", ("chunk",), e["prompt"])
        for i, e in enumerate(examples)
    ]
    set_id = preference_set_id(rows)
    table = pa.Table.from_pylist(
        [{"training_set": set_id, **vars(row)} for row in rows], schema=GOLD_PREFERENCE_EXAMPLES.rows_schema
    )
    Lake.of(tracked, tiny.name).merge(GOLD_PREFERENCE_EXAMPLES, table, run="test")
    trained = finetune(tracked, tiny, training_set=set_id, run="test")
    assert trained["base_held_out_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert trained["held_out_loss"] < math.log(2)
    logged = MlflowClient(tracked.mlflow_url).get_run(trained["mlflow_run"])
    assert logged.data.metrics["held_out_accuracy"] == trained["held_out_accuracy"]
    assert (logged.data.params["method"], logged.data.params["learning_rate"]) == ("dpo", "0.0001")


def test_only_the_last_fine_tunes_stay_on_disk(settings: Settings) -> None:
    import os

    runs = settings.home / "training" / "dev" / "qa"
    for age, name in enumerate(("embedding-2", "newest", ".embedding-3", "middle", "oldest", "embedding-1")):
        (runs / name).mkdir(parents=True)
        os.utime(runs / name, (1000 - age, 1000 - age))
    stage._forget(runs, keep=2)
    embedding = {"embedding-1", "embedding-2", ".embedding-3"}
    assert {path.name for path in runs.iterdir()} == {"newest", "middle"} | embedding, "counted for themselves"


def test_an_unreachable_mlflow_is_said_at_once(settings: Settings, tiny: Application, training_set: str) -> None:
    away = settings.model_copy(update={"mlflow_uri": "http://127.0.0.1:9"})
    with pytest.raises(ReleaseError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer"):
        finetune(away, tiny, training_set=training_set, run="test")


@pytest.mark.long  # the loop's own test does the same through Airflow
@pytest.mark.model
@pytest.mark.timeout(900)
def test_documents_become_a_registered_candidate_and_a_repeat_finds_it(tracked: Settings, tiny: Application) -> None:
    # Of a model that has learnt little, rounding decides the answers: all blocks, and enough steps.
    learning = {"lora_layers": 0, "lora_rank": 16, "epochs": 6, "learning_rate": 2e-3}
    tiny = tiny.model_copy(update={"training": tiny.training.model_copy(update=learning)})
    index(tracked, tiny)
    built = build_training_set(tracked, tiny, run="test")
    assert build_training_set(tracked, tiny, run="again") == built | {"changed": False}
    lake = Lake.of(tracked, tiny.name)
    rows = lake.read(GOLD_TRAINING_EXAMPLES).to_pylist()
    assert len(rows) == built["examples"] == 9
    assert {row["section"] for row in rows} == {"core"}  # triggerer is for evaluation
    for row in rows:
        assert row["question"] in row["prompt"]
        assert row["chunk_ids"]

    trained = finetune(tracked, tiny, training_set=built["training_set"], run="test")
    released = release_candidate(tracked, tiny, trained=trained, run="test")
    assert released["changed"]
    tags = versions(tracked, tiny)[released["version"]]
    assert tags["training_set"] == built["training_set"]
    assert tags["mlflow_run"] == trained["mlflow_run"]
    manifest = release_manifest(tracked, tiny, released["version"])
    assert manifest.prompt.template == tiny.prompt.template
    assert release_candidate(tracked, tiny, trained=trained, run="again") == released | {"changed": False}
    finetune(tracked, tiny, training_set=built["training_set"], run="again")
    costs = lake.read(OPS_COSTS, where=pc.field("stage") == "training").to_pylist()
    assert [cost["release_id"] for cost in costs] == [released["release_id"]]

    DeltaTable(lake.uri(GOLD_TRAINING_EXAMPLES)).delete(f"example_id = '{rows[0]['example_id']}'")  # of an erased user
    with pytest.raises(TrainingError, match=r"has 8 rows .* and they don't give its id"):
        release_candidate(tracked, tiny, trained=trained, run="later")


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(1500)
def test_where_a_server_has_the_model_a_candidate_is_an_adapter_that_it_loads_until_nobody_needs_it(
    tracked: Settings, tiny: Application, training_set: str, model_folder: Path, tmp_path: Path
) -> None:
    learning = {"lora_layers": 0, "lora_rank": 16, "epochs": 6, "learning_rate": 2e-3}
    tiny = tiny.model_copy(update={"training": tiny.training.model_copy(update=learning)})
    index(tracked, tiny)
    trained = finetune(tracked, tiny, training_set=training_set, run="test")
    with vllm_server(model_folder, tmp_path) as server:
        changes = {"upstream_url": server.upstream.url, "upstream_api_key": KEY, "upstream_model": server.model}
        settings = Settings.model_validate(tracked.model_dump() | changes)
        declared = declare_release(settings, tiny, variant=None, run="test")["version"]
        released = release_candidate(settings, tiny, trained=trained, run="test")
        assert released["changed"]
        assert release_candidate(settings, tiny, trained=trained, run="again") == released | {"changed": False}
        generator = release_manifest(settings, tiny, released["version"]).generator
        assert isinstance(generator, ServedModel)
        assert [file.name for file in generator.adapter] == ["adapter_config.json", "adapter_model.safetensors"]
        assert _adapters(server) == []  # the check's own is unloaded

        loader = ReleaseLoader(settings, tiny)
        question = "What is the default of parallelism?"
        answers = [loader.load(version).answer(question).text for version in (declared, released["version"])]
        assert answers[0] != answers[1]
        assert _adapters(server) == [adapter_name(generator)]

        at_once = tiny.model_copy(update={"retention": tiny.retention.model_copy(update={"unused_releases": 1e-9})})
        removed = remove_unused(settings, at_once)["releases"]
        assert released["release_id"] in removed
        assert _adapters(server) == []


def _adapters(server: Served) -> list[str]:
    return [one.id for one in server.upstream.client().models.list() if one.id != server.model]


@pytest.mark.model
@pytest.mark.timeout(300)
def test_too_few_questions_are_refused_with_what_was_left_out(tracked: Settings, tiny: Application) -> None:
    questions = tiny.questions.model_copy(update={"evaluation_sections": ("core", "triggerer")})
    only = tiny.model_copy(update={"questions": questions})
    index(tracked, only)
    with pytest.raises(TrainingError, match="0 training examples, at least 8 are needed"):
        build_training_set(tracked, only, run="test")
