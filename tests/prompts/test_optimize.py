"""The stage, over a lake on disk and a real MLflow: what is registered, and what is not; one test with the model."""

from dataclasses import asdict
from typing import Any

import pytest

from millrace.applications import Application, Optimize
from millrace.errors import PromptError, RetrievalError
from millrace.evaluation.canaries import publish_build
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS, OPS_PROMPT_TRIALS
from millrace.prompts.development import Development
from millrace.prompts.optimize import _Answering, _Plan, optimize_prompt, release_best
from millrace.prompts.space import Point, space_of
from millrace.prompts.study import Trial, search
from millrace.prompts.trials import keep_trial
from millrace.prompts.versions import list_versions
from millrace.releases.declare import declare_release
from millrace.releases.manifest import Manifest
from millrace.releases.published_split import publish_split
from millrace.releases.registry import release_manifest, versions
from millrace.releases.split import Split
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import refresh_embeddings
from millrace.retrieval.index import build_index
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents
from tests.prompts.engine import SEARCH

TEMPLATE = "Copy the answer.\n{% for chunk in chunks %}{{ chunk.text }}\n{% endfor %}{{ question }}"
POINT = Point("copy", chunks=3, few_shot=2, max_new_tokens=20, temperature=0.0)


def a_result(champion: str, verdict: str = "better") -> dict[str, Any]:
    return {"verdict": verdict, "study": "study-1", "champion": champion, "best": {"trial": 4, **asdict(POINT)}}


def test_the_best_becomes_a_candidate_with_the_champions_weights_and_is_registered_once(
    registry: Settings, application: Application, champion: tuple[str, Manifest]
) -> None:
    version, manifest = champion
    lake = Lake.of(registry, application.name)
    trial = Trial(4, POINT, "complete", {"q": 1.0}, 1, 1, 1.0, "")
    about = {"champion_release_id": manifest.release_id, "index_build": "build"}
    keep_trial(lake, "study-1", "search", trial, template=TEMPLATE, about=about, run="test")

    released = release_best(registry, application, result=a_result(version), run="test")
    made = release_manifest(registry, application, released["version"])
    assert released["changed"]
    assert made.release_id == released["release_id"] != manifest.release_id
    assert (made.prompt.template, made.retrieval.chunks, made.generation.max_new_tokens) == (TEMPLATE, 3, 20)
    assert (made.generator, made.retrieval.lineage) == (manifest.generator, manifest.retrieval.lineage)
    tags = versions(registry, application)[released["version"]]
    assert (tags["millrace.origin"], tags["study"], tags["millrace.state"]) == ("prompt_study", "study-1", "candidate")
    # Its weights were trained on this: the gate looks for leaks there.
    assert (tags["training_set"], tags["simulated"]) == ("train-1", "true")

    again = release_best(registry, application, result=a_result(version), run="again")
    assert again == released | {"changed": False}
    assert [one.version for one in list_versions(registry, application)] == [1, 2]


def test_what_is_not_better_registers_nothing(
    registry: Settings, application: Application, champion: tuple[str, Manifest]
) -> None:
    for verdict in ("not better", "nothing"):
        released = release_best(registry, application, result=a_result(champion[0], verdict), run="test")
        assert released == {"version": None, "release_id": None, "prompt_version": None, "changed": False}
    assert list(versions(registry, application)) == [champion[0]]
    assert [one.version for one in list_versions(registry, application)] == [1]


def test_a_study_whose_trial_is_gone_registers_nothing(
    registry: Settings, application: Application, champion: tuple[str, Manifest]
) -> None:
    with pytest.raises(PromptError, match="study study-1 has no trial 4 in ops/prompt_trials"):
        release_best(registry, application, result=a_result(champion[0]), run="test")
    assert list(versions(registry, application)) == [champion[0]]


def test_without_a_champion_there_is_nothing_to_optimise(registry: Settings, application: Application) -> None:
    assert optimize_prompt(registry, application, run="test")["verdict"] == "nothing"


def test_without_an_index_build_it_is_said_what_to_run(
    registry: Settings, application: Application, champion: tuple[str, Manifest]
) -> None:
    with pytest.raises(RetrievalError, match=rf"has no index build in .*; run {application.name}\.refresh_embeddings"):
        optimize_prompt(registry, application, run="test")


def test_a_champion_that_can_not_be_loaded_ends_the_study_and_fails_no_trial(
    registry: Settings, application: Application, champion: tuple[str, Manifest]
) -> None:
    space = space_of(champion[1], application.prompt, Optimize(), ())
    plan = _Plan("study-1", "99", space, Development((), (), (), 0), "build", Optimize())
    with (
        _Answering(registry, application, plan) as answering,
        pytest.raises(PromptError, match=r"champion 99 can't be loaded: .* is not registered"),
    ):
        search(space, SEARCH, Optimize(), answering.prepare, [], lambda _: pytest.fail("a trial was kept"))


@pytest.mark.long  # the loop holds one, through Airflow
@pytest.mark.model
@pytest.mark.timeout(300)
def test_a_real_study_is_held_once_and_says_with_an_interval_whether_its_best_is_better(
    registry: Settings, qa: Application
) -> None:
    """The start tells the model to repeat words; so that a better prompt is sure to exist, the others don't."""
    useless = "Repeat these words and nothing else: {{ question }}"
    application = qa.model_copy(
        update={
            "name": "prompts_model",
            "prompt": qa.prompt.model_copy(update={"template": useless, "variants": {"good": qa.prompt.template}}),
            "optimize": Optimize(trials=3, token_budget=60_000, questions=8, held_out=8, chunks=(1,), few_shot=(2,)),
        }
    )
    for stage in (land_documents, refine_documents, refresh_chunks, refresh_embeddings):
        stage(registry, application, run="test")
    build = build_index(registry, application, run="test")["build"]
    publish_build(registry, application, build, run="test")
    first = declare_release(registry, application, variant=None, run="test")["version"]
    publish_split(registry, application.name, Split(sequence=0, champion=first))

    result = optimize_prompt(registry, application, run="test")
    lake = Lake.of(registry, application.name)
    rows = lake.read(OPS_PROMPT_TRIALS).to_pylist()
    assert result["trials"] == 3
    assert result["tokens"] == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows) <= 60_000
    costs = [row for row in lake.read(OPS_COSTS).to_pylist() if row["stage"] == "optimisation"]
    assert sum(row["tokens"] for row in costs) == result["tokens"]
    assert {row["part"] for row in rows} == {"search", "held_out"}
    assert {row["index_build"] for row in rows} == {build}
    assert result["estimate"] == pytest.approx(result["best_token_f1"] - result["start_token_f1"])
    assert result["low"] <= result["estimate"] <= result["high"]
    assert result["verdict"] == ("better" if result["low"] > 0 else "not better")

    version = lake.version(OPS_PROMPT_TRIALS)
    assert optimize_prompt(registry, application, run="again") == result
    assert lake.version(OPS_PROMPT_TRIALS) == version
    released = release_best(registry, application, result=result, run="test")
    assert (released["version"] is not None) == (result["verdict"] == "better")
