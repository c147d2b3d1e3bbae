"""Training that goes on from a release, and learning from one."""

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from millrace.applications import Application
from millrace.errors import TrainingError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES, OPS_COSTS
from millrace.lakehouse.trained import trained_sets
from millrace.releases.declare import declare_release
from millrace.releases.loader import ReleaseLoader
from millrace.releases.published_split import publish_split
from millrace.releases.registry import tag_release, versions
from millrace.releases.split import Split
from millrace.settings import Settings
from millrace.training.candidate import release_candidate
from millrace.training.finetune import build_set, finetune
from millrace.training.pool import Asked
from millrace.training.sets import read_training_set
from millrace.training.starting import starting_weights
from millrace.training.teacher import taught
from tests.monitoring.silver import NOON, exchange, write
from tests.training.conftest import index

TERSE = (
    "{% for chunk in chunks %}{{ chunk.text }}\n{% endfor %}\nQuestion: {{ question }}\n"
    "Answer in one short sentence, only from the text above."
)
PRUNED_STUDENT = {"start": "champion", "teacher": "champion", "remove_blocks": 4, "max_examples": 30}


@pytest.fixture
def champion(tracked: Settings, tiny: Application) -> str:
    """The version of the declared release, with an index. So asked, the base model ends its answers."""
    index(tracked, tiny)
    prompt = tiny.prompt.model_copy(update={"template": TERSE, "variants": {}})
    version: str = declare_release(tracked, tiny.model_copy(update={"prompt": prompt}), variant=None, run="test")[
        "version"
    ]
    publish_split(tracked, tiny.name, Split(sequence=0, champion=version))
    return version


@pytest.mark.model
def test_going_on_from_the_champion_learns_what_is_new_and_replays_a_share_of_the_old(
    tracked: Settings, tiny: Application, champion: str
) -> None:
    # The champion is the base model: there is nothing to go on from, and all is new.
    first = build_set(tracked, tiny, run="test", max_examples=12, start="champion")
    assert (first["learns"]["start"], first["examples"], first["replayed"]) == (None, 12, 0)

    tag_release(tracked, tiny, champion, {"training_set": first["training_set"], "earlier_training_sets": "train-x"})
    built = build_set(tracked, tiny, run="test", max_examples=20, start="champion")
    assert built["learns"] == {
        "training_set": built["training_set"],
        "start": champion,
        "teacher": None,
        "remove_blocks": 0,
    }
    lake = Lake.of(tracked, tiny.name)
    before, now = ({one.example_id for one in read_training_set(lake, one["training_set"])} for one in (first, built))
    assert len(now & before) == built["replayed"] > 0
    assert len(now & before) / len(now) == pytest.approx(tiny.training.replay, abs=0.05)
    assert starting_weights(tracked, tiny, champion).training_sets == (first["training_set"], "train-x")

    everything = sorted(set(lake.read(GOLD_TRAINING_EXAMPLES)["training_set"].to_pylist()))
    whole = build_set(tracked, tiny, run="test", max_examples=1000, start="base")
    tag_release(tracked, tiny, champion, {"earlier_training_sets": " ".join([*everything, whole["training_set"]])})
    waiting = build_set(tracked, tiny, run="test", start="champion")
    assert waiting["training_set"] is None
    assert waiting["why"].endswith(f"0 training examples are new since release {champion}, at least 8 are waited for")


@pytest.mark.model
def test_a_teacher_answers_users_and_documents_questions_with_more_chunks(
    tracked: Settings, tiny: Application, champion: str
) -> None:
    lake = Lake.of(tracked, tiny.name)
    asked = ["What does parallelism limit?", "what does parallelism limit", "What is a triggerer?"]
    write(lake, [exchange(NOON + timedelta(minutes=n), question=question) for n, question in enumerate(asked)])
    known = [Asked("What is the default of [core] parallelism?", "32", "document", False, "core", "some document")]
    answers, unfinished = taught(tracked, tiny, champion, known, ["What is a triggerer?"], size=10, run="test")
    assert len(answers) + unfinished == 2
    assert {(one.question.lower().strip("?"), one.document_id) for one in answers} <= {
        ("what does parallelism limit", None),
        ("what is the default of [core] parallelism", "some document"),
    }
    assert answers
    assert {(one.origin, one.simulated) for one in answers} <= {("teacher", True), ("teacher", False)}
    (cost,) = lake.read(OPS_COSTS, where=pc.field("subject") == f"answers of release {champion}").to_pylist()
    assert cost["tokens"] > 0
    with pytest.raises(TrainingError, match="dpo learns preferences"):
        build_set(tracked, tiny, run="test", method="dpo", teacher="champion")


@pytest.fixture
def learning(tiny: Application) -> Application:
    """Of a model that has learnt little, rounding decides the answers: all blocks, and enough steps."""
    enough = {"lora_layers": 0, "lora_rank": 16, "epochs": 6, "learning_rate": 2e-3}
    return tiny.model_copy(update={"training": tiny.training.model_copy(update=enough)})


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_a_fine_tune_of_a_fine_tune_and_its_pruned_student_are_candidates_that_say_where_they_are_from(
    tracked: Settings, learning: Application, champion: str
) -> None:
    sets = []
    for chosen in ({"start": "base"}, {"start": "champion"}, PRUNED_STUDENT):
        built = build_set(tracked, learning, run="test", **chosen)
        sets.append(built["training_set"])
        trained = finetune(tracked, learning, run="test", **built["learns"])
        released = release_candidate(tracked, learning, trained=trained, run="test")
        tags = versions(tracked, learning)[released["version"]]
        assert trained_sets(tags) == tuple(reversed(sets))
        taught_by, champion = champion, released["version"]
        publish_split(tracked, learning.name, Split(sequence=len(sets), champion=champion))
    steps = (Path(trained["folder"]) / "progress.jsonl").read_text().splitlines()
    losses = [json.loads(step)["loss"] for step in steps]
    # Not on what is held out: that is two answers, which the pruned model may know before.
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 2, "what pruning broke is not mended"
    assert (tags["teacher"], tags["removed_blocks"]) == (f"release {taught_by}", "4")
    for saved in ("bytes", "resident_mib"):
        assert float(tags[saved]) < float(tags[f"{saved}_before"])
    loader = ReleaseLoader(tracked, learning)
    try:
        assert loader.load(champion).answer("What is the default of parallelism?").text
    finally:
        loader.close()
    assert finetune(tracked, learning, run="again", **built["learns"]) == trained | {"changed": False}
