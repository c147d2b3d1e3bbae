"""Trials in a real Delta table: read as they were kept, kept once."""

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_PROMPT_TRIALS
from millrace.prompts.space import Point
from millrace.prompts.study import Trial
from millrace.prompts.trials import keep_trial, read_template, read_trials

POINT = Point("copy", chunks=2, few_shot=1, max_new_tokens=48, temperature=0.0)
ABOUT = {"champion_release_id": "rel-1", "index_build": "build"}
TRIALS = [
    Trial(0, POINT, "complete", {"q9": 0.5, "q1": 1.0, "q5": 1 / 3}, 100, 23, 4.5, ""),
    Trial(1, POINT, "failed", {}, 0, 0, 0.1, "it can't be rendered"),
    Trial(2, POINT, "pruned", {"q9": 0.0}, 30, 10, 1.0, "losing"),
]


def test_trials_are_read_as_they_were_kept_in_order_with_their_questions_in_order(lake: Lake) -> None:
    for trial in reversed(TRIALS):
        keep_trial(lake, "study-1", "search", trial, template="{{ question }}", about=ABOUT, run="test")
    keep_trial(lake, "study-1", "held_out", TRIALS[0], template="{{ question }}", about=ABOUT, run="test")
    keep_trial(lake, "study-2", "search", TRIALS[1], template="other", about=ABOUT, run="test")
    found = read_trials(lake, "study-1", "search")
    assert list(found.values()) == TRIALS
    assert list(found[0].scores) == ["q9", "q1", "q5"]
    assert read_trials(lake, "study-1", "held_out") == {0: TRIALS[0]}
    assert read_template(lake, "study-1", 2) == "{{ question }}"
    assert read_template(lake, "study-1", 3) is None
    means = lake.read(OPS_PROMPT_TRIALS, ["trial", "token_f1"]).to_pylist()
    assert {"trial": 1, "token_f1": None} in means


def test_a_trial_that_is_kept_again_changes_nothing(lake: Lake) -> None:
    keep_trial(lake, "study-1", "search", TRIALS[0], template="a", about=ABOUT, run="test")
    version = lake.version(OPS_PROMPT_TRIALS)
    keep_trial(lake, "study-1", "search", TRIALS[0], template="b", about=ABOUT, run="again")
    assert lake.version(OPS_PROMPT_TRIALS) == version


def test_a_study_that_was_never_held_has_no_trials(lake: Lake) -> None:
    assert read_trials(lake, "study-1", "search") == {}
