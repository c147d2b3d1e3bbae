"""The gate over real tables and a real MLflow server; one test lets the real model answer."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from millrace.applications import Application, Gate
from millrace.environments.audit import search, verify
from millrace.errors import GateRefusal, MillraceError
from millrace.evaluation.gate import evaluate_candidate, find_leaks, newest_unevaluated, require_passed
from millrace.evaluation.sets import Example, freeze_evaluation_set, read_evaluation_set
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES, OPS_COSTS, OPS_EVALUATIONS
from millrace.releases.declare import add_model, declare_release
from millrace.releases.manifest import PromptVersion, declared_manifest, describe_weights
from millrace.releases.published_split import publish_split
from millrace.releases.registry import register_release
from millrace.releases.split import Split
from millrace.retrieval.embed import lineage_id
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents

EXAMPLES = [
    Example("e1", "core", "What is the default of [core] parallelism?", "32", "d1"),
    Example("e2", "core", "What is the default of [core] executor?", "LocalExecutor", "d2"),
    Example("e3", "core", "Which version of Airflow added [core] hostname_callable?", "1.10.3", "d3"),
]


@pytest.fixture
def served(settings: Settings, mlflow_uri: str) -> Settings:
    """Settings with a real MLflow server."""
    return settings.model_copy(update={"mlflow_uri": mlflow_uri})


@pytest.fixture
def own(qa: Application, tmp_path: Path) -> Application:
    """`qa` under a name that no other test has registered anything under."""
    return qa.model_copy(update={"name": "gate_" + "".join(c for c in tmp_path.name if c.isalnum()).lower()})


def test_a_refusal_names_the_criterion_the_numbers_and_three_examples():
    with pytest.raises(GateRefusal) as refusal:
        require_passed(_result("refused"))
    assert str(refusal.value) == (
        "version 2 was refused against champion 1: quality went from 0.8 to 0.1. Worst examples: "
        "'Q0' (0.80 → 0.10, 2.0 s: 'wrong'; known answer 'right'); "
        "'Q1' (0.80 → 0.10, 2.0 s: 'the engine is broken'; known answer 'right'). "
        "All of them: evaluation eval-1 in ops/evaluations"
    )


@pytest.mark.parametrize("verdict", ["passed", "nothing"])
def test_who_passed_and_who_was_not_compared_is_not_refused(verdict):
    require_passed(_result(verdict))


def test_a_refused_leak_names_what_was_trained_on():
    example = {"question": "What is it?", "answer": "this", "trained_on": "what is it"}
    with pytest.raises(GateRefusal, match=r"'What is it\?' \(trained on 'what is it'\)"):
        require_passed(_result("refused") | {"worst": [example]})


def test_the_newest_version_after_the_champion_that_was_not_compared_with_it_is_next(lake: Lake):
    assert newest_unevaluated(lake, "2", ["1", "2"]) is None
    assert newest_unevaluated(lake, "2", ["1", "2", "3", "10"]) == "10"
    _evaluated(lake, champion="2", candidate="10")
    assert newest_unevaluated(lake, "2", ["1", "2", "3", "10"]) == "3"
    _evaluated(lake, champion="1", candidate="3")
    assert newest_unevaluated(lake, "2", ["1", "2", "3", "10"]) == "3"


def test_training_questions_that_are_nearly_evaluation_questions_are_found(lake: Lake):
    _trained(lake, "t1", ["what is the default of core parallelism", "What is the default of [core] dags_folder?"])
    assert find_leaks(lake, "t1", EXAMPLES) == [("what is the default of core parallelism", EXAMPLES[0])]


def test_a_training_set_that_is_gone_cannot_be_called_clean(lake: Lake):
    with pytest.raises(MillraceError, match="t9 is not in gold/training_examples"):
        find_leaks(lake, "t9", EXAMPLES)


def test_without_a_champion_or_a_candidate_there_is_nothing_to_do(served: Settings, own: Application, tmp_path: Path):
    assert evaluate_candidate(served, own, run="test")["verdict"] == "nothing"
    first = _registered(served, own, tmp_path, "first")
    assert evaluate_candidate(served, own, run="test")["why"] == "there is no champion to compare with"
    publish_split(served, own.name, Split(sequence=0, champion=first))
    assert evaluate_candidate(served, own, run="test")["verdict"] == "nothing"
    assert evaluate_candidate(served, own, run="test", candidate=first)["why"] == f"version {first} is the champion"
    with pytest.raises(MillraceError, match="no release version '99'; registered are 1"):
        evaluate_candidate(served, own, run="test", candidate="99")


def test_a_candidate_that_was_trained_on_the_questions_is_refused_before_anything_is_loaded(
    served: Settings, own: Application, tmp_path: Path
):
    lake = Lake.of(served, own.name)
    land_documents(served, own, run="test")
    refine_documents(served, own, run="test")
    examples = read_evaluation_set(lake, freeze_evaluation_set(served, own, run="test"))
    _trained(lake, "t1", [examples[0].question.upper(), "What is love?"])
    champion = _registered(served, own, tmp_path, "first")
    # The weights are no weights: loading them would fail.
    candidate = _registered(served, own, tmp_path, "second", training_set="t1")
    publish_split(served, own.name, Split(sequence=0, champion=champion))
    _published(served, own)

    result = evaluate_candidate(served, own, run="test")
    assert (result["verdict"], result["candidate"], result["changed"]) == ("refused", candidate, True)
    assert [criterion["name"] for criterion in result["criteria"]] == ["leak"]
    assert result["worst"][0]["trained_on"] == examples[0].question.upper()
    with pytest.raises(GateRefusal, match="1 questions of training set t1 are, or nearly are, evaluation questions"):
        require_passed(result)
    assert evaluate_candidate(served, own, run="test", candidate=candidate) == result | {"changed": False}
    (logged,) = _logged(served, own)
    assert logged.data.metrics == {"leak.count": 1, "leak.passed": 0}
    (entry,) = search(served, application=own.name)
    told = [entry[name] for name in ("actor", "action", "resource", "outcome", "release_version", "run")]
    verdict = f"ops/evaluations/{result['evaluation_id']}"
    assert told == ["service/gate", "gate", verdict, "refused", candidate, "test"]
    assert entry["details"]["failed"] == ["leak"]
    assert examples[0].question.upper() not in str(entry)
    assert verify(served).waiting == 0


@pytest.mark.long  # the loop's own test does the same through Airflow
@pytest.mark.model
def test_a_broken_prompt_and_weights_that_know_nothing_are_refused_and_an_equal_prompt_passes_each_evaluated_once(
    served: Settings, qa: Application, tiny_model: Path
):
    from millrace.retrieval.chunk import refresh_chunks
    from millrace.retrieval.embed import refresh_embeddings
    from millrace.retrieval.index import build_index, declared_builds

    variants = {"broken": "Repeat these words and nothing else: {{ question }}", "equal": qa.prompt.template + " "}
    application = qa.model_copy(
        update={
            "name": "gate_model",
            "prompt": qa.prompt.model_copy(update={"variants": variants}),
            # How busy the machine is must not decide this test; prompts of one length cost the same.
            "gate": Gate(max_examples=16, latency_ratio=20, resamples=1000),
        }
    )
    for stage in (land_documents, refine_documents, refresh_chunks, refresh_embeddings):
        stage(served, application, run="test")
    build = build_index(served, application, run="test")["build"]
    declared_builds(served, application).publish(build)
    first, broken, equal = (
        declare_release(served, application, variant=variant, run="test")["version"]
        for variant in (None, "broken", "equal")
    )
    publish_split(served, application.name, Split(sequence=0, champion=first))
    empty = add_model(served, application, tiny_model, name="tiny", run="test")["version"]

    refused = evaluate_candidate(served, application, run="test", candidate=broken)
    failed = [criterion["name"] for criterion in refused["criteria"] if not criterion["passed"]]
    assert (refused["verdict"], failed) == ("refused", ["quality"])
    assert refused["index_build"] == build
    retrieval = next(c for c in refused["criteria"] if c["name"] == "retrieval")
    assert (retrieval["low"], retrieval["estimate"], retrieval["high"]) == (0, 0, 0)

    general = next(c for c in refused["criteria"] if c["name"] == "general")
    assert "generates with what the champion does" in general["why"]

    forgot = evaluate_candidate(served, application, run="test", candidate=empty)
    names = ["leak", "quality", "retrieval", "general", "latency", "cost"]
    assert [criterion["name"] for criterion in forgot["criteria"]] == names
    general = forgot["criteria"][3]
    assert (general["candidate"], general["passed"]) == (0, False)
    with pytest.raises(GateRefusal, match=r"share of general questions answered went from 0\.\d+ to 0\.000"):
        require_passed(forgot)

    passed = evaluate_candidate(served, application, run="test")
    assert (passed["verdict"], passed["candidate"]) == ("passed", equal)
    require_passed(passed)

    lake = Lake.of(served, application.name)
    version = lake.version(OPS_EVALUATIONS)
    assert evaluate_candidate(served, application, run="again", candidate=broken) == refused | {"changed": False}
    assert evaluate_candidate(served, application, run="again")["verdict"] == "nothing"
    assert lake.version(OPS_EVALUATIONS) == version
    costs = {row["subject"]: row for row in lake.read(OPS_COSTS).to_pylist() if row["stage"] == "evaluation"}
    done = [one["evaluation_id"] for one in (refused, forgot, passed)]
    assert costs.keys() == set(done), "a repeat costs nothing"
    asked_more = [costs[one]["tokens"] for one in done]
    assert asked_more[1] > max(asked_more[0], asked_more[2]) + 2 * 60 * 50, "general questions are counted"
    for cost in costs.values():
        assert cost["tokens"] > 2 * 16 * 10
        assert cost["cost_usd"] > 0
        assert cost["release_id"].startswith("rel-")
    logged = _logged(served, application)
    assert sum("general.candidate" in run.data.metrics for run in logged) == 1
    assert {run.data.tags["verdict"] for run in logged} == {"passed", "refused"}
    assert len(logged) == 3
    assert all(run.info.status == "FINISHED" for run in logged)


def _result(verdict: str) -> dict[str, Any]:
    champion = {"quality": 0.8, "seconds": 1.0, "answer": "right", "error": ""}
    candidate = {"quality": 0.1, "seconds": 2.0, "answer": "wrong", "error": ""}
    return {
        "verdict": verdict,
        "evaluation_id": "eval-1",
        "champion": "1",
        "candidate": "2",
        "criteria": [
            {"name": "quality", "passed": False, "why": "quality went from 0.8 to 0.1"},
            {"name": "cost", "passed": True, "why": "cost is the same"},
        ],
        "worst": [
            {"question": "Q0", "answer": "right", "champion": champion, "candidate": candidate},
            {
                "question": "Q1",
                "answer": "right",
                "champion": champion,
                "candidate": candidate | {"answer": "", "error": "the engine is broken"},
            },
        ],
    }


def _evaluated(lake: Lake, *, champion: str, candidate: str) -> None:
    row = dict.fromkeys(OPS_EVALUATIONS.rows_schema.names, "") | {
        "evaluation_id": f"{champion}-{candidate}",
        "champion": champion,
        "candidate": candidate,
        "passed": False,
        "criteria": "[]",
        "examples": "[]",
        "evaluated_at": datetime.now(UTC),
    }
    lake.merge(OPS_EVALUATIONS, pa.Table.from_pylist([row], schema=OPS_EVALUATIONS.rows_schema), run="test")


def _trained(lake: Lake, training_set: str, questions: list[str]) -> None:
    rows = [
        {
            "training_set": training_set,
            "example_id": str(number),
            "origin": "document",
            "simulated": False,
            "section": None,
            "question": question,
            "answer": "an answer",
            "chunk_ids": [],
            "prompt": question,
        }
        for number, question in enumerate(questions)
    ]
    table = pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema)
    lake.merge(GOLD_TRAINING_EXAMPLES, table, run="test")


def _registered(
    settings: Settings, application: Application, folder: Path, name: str, *, training_set: str | None = None
) -> str:
    """A release whose weights nothing can load."""
    weights = folder / f"{name}.gguf"
    weights.write_text(name)
    prompt = PromptVersion(name=f"{application.name}.answer", version="1", template="{{ question }}")
    manifest = declared_manifest(application, describe_weights(weights), prompt, lineage_id(application))
    tags = {"training_set": training_set} if training_set else {}
    return register_release(settings, application, manifest, weights.parent, run="test", tags=tags)


def _logged(settings: Settings, application: Application) -> list[Any]:
    """MLflow's runs of the application's evaluations."""
    from mlflow import MlflowClient

    client = MlflowClient(settings.mlflow_url)
    experiment = client.get_experiment_by_name(f"{application.name}/evaluations")
    return list(client.search_runs([experiment.experiment_id]))


def _published(settings: Settings, application: Application) -> None:
    """The pointer to an index build that nobody will search."""
    folder = settings.index_builds(application.name) / lineage_id(application)
    folder.mkdir(parents=True)
    pointer = {"format": 1, "build": "none", "previous": None, "published_at": datetime.now(UTC).isoformat()}
    (folder / "current.json").write_text(json.dumps(pointer))
