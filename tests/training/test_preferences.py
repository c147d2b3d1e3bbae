import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.applications import Application
from millrace.errors import TrainingError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_EVALUATION_EXAMPLES, GOLD_PREFERENCE_EXAMPLES, SILVER_FEEDBACK
from millrace.lakehouse.trained import trained_questions
from millrace.settings import Settings
from millrace.training.preferences import (
    Compared,
    PreferenceExample,
    build_preference_set,
    preference_set_id,
    preferences,
    read_preference_set,
)
from tests.training.conftest import feedback, index


def test_a_correction_is_better_than_the_answer_that_it_corrects() -> None:
    found = list(
        preferences(
            feedback(
                {"rating": 0.0, "answer": "A cow.", "correction": "A cat."},
                {"rating": 0.1, "answer": "A horse.", "correction": "A dog.", "question": "what is it"},
                {"rating": 0.9, "answer": "Fine.", "correction": "Finer.", "question": "Already good?"},
                {"rating": 0.0, "answer": "The same.", "correction": "the same", "question": "Not corrected?"},
                {"rating": 0.0, "answer": None, "correction": "Something.", "question": "No answer?"},
            )
        )
    )
    assert found == [Compared("what is it", "A dog.", "A horse.", "correction", False)]


def test_two_answers_are_compared_where_their_ratings_are_clearly_apart() -> None:
    rows = [
        {"rating": 1.0, "answer": "A cat."},
        {"rating": 0.8, "answer": "a cat", "simulated": True},
        {"rating": 0.5, "answer": "A pet."},
        {"rating": 0.2, "answer": "A dog."},
    ]
    assert list(preferences(feedback(*rows))) == [Compared("What is it?", "a cat", "A dog.", "ratings", True)]
    # One bad rating of the good answer, and nobody can say any more.
    assert not list(preferences(feedback(*rows, {"rating": 0.0, "answer": "A cat."})))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", "z"]), st.floats(0, 1)), max_size=20))
def test_nobody_is_told_to_prefer_an_answer_to_itself(said: list[tuple[str, str, float]]) -> None:
    rows = [{"question": q, "answer": a, "rating": rating} for q, a, rating in said]
    found = list(preferences(feedback(*rows)))
    assert all(pair.chosen != pair.rejected for pair in found)
    assert len({pair.question for pair in found}) == len(found)


def test_a_set_reads_back_as_it_was_written_and_not_when_a_row_was_lost(lake: Lake) -> None:
    examples = [PreferenceExample(str(i), "ratings", False, f"{i}?", "yes", "no", ("c",), f"{i}") for i in range(8)]
    set_id = preference_set_id(examples)
    rows = [{"training_set": set_id, **vars(e), "chunk_ids": list(e.chunk_ids)} for e in examples]
    table = pa.Table.from_pylist(rows, schema=GOLD_PREFERENCE_EXAMPLES.rows_schema)
    lake.merge(GOLD_PREFERENCE_EXAMPLES, table, run="t")
    assert read_preference_set(lake, set_id) == examples
    assert sorted(trained_questions(lake, set_id)) == [f"{i}?" for i in range(8)]
    with pytest.raises(TrainingError, match="prefer-none has 0 rows"):
        read_preference_set(lake, "prefer-none")


@pytest.mark.model
@pytest.mark.timeout(300)
def test_feedback_becomes_a_preference_set_without_what_the_gate_asks(tracked: Settings, tiny: Application) -> None:
    index(tracked, tiny)
    lake = Lake.of(tracked, tiny.name)
    names = ("parallelism", "executor", "plugins", "hostname", "fernet", "timezone", "daemon", "umask", "dags", "smtp")
    rows = [
        {"question": f"What is {name} for?", "answer": "Nothing.", "correction": f"For {name}.", "rating": 0.0}
        for name in names
    ]
    lake.merge(SILVER_FEEDBACK, feedback(*rows), run="test")
    asked = {
        "evaluation_set": "eval",
        "example_id": "1",
        "section": None,
        "question": "what is UMASK for",
        "answer": "For files.",
        "document_id": "d",
    }
    evaluation = pa.Table.from_pylist([asked], schema=GOLD_EVALUATION_EXAMPLES.rows_schema)
    lake.merge(GOLD_EVALUATION_EXAMPLES, evaluation, run="test")

    built = build_preference_set(tracked, tiny, run="test", max_examples=100)
    assert (built["examples"], built["corrections"]) == (9, 9)
    assert built["left_out"] == {"nearly an evaluation question": 1}
    assert build_preference_set(tracked, tiny, run="again", max_examples=100) == built | {"changed": False}
    for example in read_preference_set(lake, built["training_set"]):
        assert example.question in example.prompt
        assert example.chunk_ids
        assert "umask" not in example.question
    with pytest.raises(TrainingError, match="5 pairs of a better and a worse answer, at least 8 are needed"):
        build_preference_set(tracked, tiny, run="test", max_examples=5)
