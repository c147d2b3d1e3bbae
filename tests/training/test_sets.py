import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import TrainingError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES
from millrace.scoring.duplicates import near_duplicates
from millrace.training.pool import Asked, corrections
from millrace.training.sets import Example, choose, joined, read_training_set, refuse_leaks, training_set_id
from tests.training.conftest import feedback


def asked(question: str, origin: str = "document", section: str | None = "api") -> Asked:
    return Asked(question, "yes", origin, False, section, "document")  # type: ignore[arg-type]


def example(question: str, section: str | None = "api") -> Example:
    a = asked(question, section=section)
    return Example(a.example_id, a.origin, a.simulated, section, question, a.answer, ("chunk",), f"{question}?")


def prompted(a: Asked) -> Example:
    return Example(a.example_id, a.origin, a.simulated, a.section, a.question, a.answer, ("chunk",), f"{a.question}?")


def test_corrections_of_bad_answers_are_learnt_once_a_question_the_latest_one() -> None:
    rows = feedback(
        {"rating": 0.0, "question": "What is it?", "correction": "A cat."},
        {"rating": 0.1, "question": "what is it", "correction": "A dog.", "simulated": True},
        {"rating": 0.9, "question": "And that?", "correction": "Fine already."},
        {"rating": 0.0, "question": "Nothing said?", "correction": None},
        {"rating": 0.0, "question": "Only spaces?", "correction": "  "},
        {"rating": 0.0, "question": "An essay?", "correction": "word " * 1000},
    )
    (found,) = corrections(rows)
    assert (found.question, found.answer, found.origin, found.simulated) == ("what is it", "A dog.", "correction", True)


def test_a_question_near_an_evaluation_question_is_left_out_and_counted() -> None:
    pool = [asked(f"What does option number {word} do?") for word in ("alpha", "beta", "gamma", "delta")]
    examples, left_out = choose(pool, ["what does option number BETA do"], prompted, 10)
    assert {e.question for e in examples} == {p.question for p in pool if "beta" not in p.question}
    assert left_out == {"nearly an evaluation question": 1}


def test_a_question_whose_answer_is_not_retrieved_is_left_out_and_counted() -> None:
    pool = [asked(f"Question {i}?") for i in range(10)]
    examples, left_out = choose(pool, [], lambda a: None if "3" in a.question else prompted(a), 10)
    assert len(examples) == 9
    assert left_out == {"answer not retrieved": 1}


def test_what_a_teacher_answers_is_chosen_like_what_documents_do() -> None:
    examples, left_out = choose([asked(f"Question {i}?", "teacher") for i in range(9)], [], prompted, 8)
    assert ([example.origin for example in examples], left_out) == (["teacher"] * 8, {})


@given(st.integers(1, 20), st.integers(0, 15), st.integers(0, 15))
def test_corrections_take_at_most_half_while_there_are_documents_questions(size: int, said: int, derived: int) -> None:
    pool = [asked(f"said {i}", "correction") for i in range(said)] + [asked(f"derived {i}") for i in range(derived)]
    examples, _ = choose(pool, [], prompted, size)
    assert len(examples) == min(size, said + derived)
    corrected = sum(e.origin == "correction" for e in examples)
    assert corrected == max(min(said, size // 2), size - derived if said + derived >= size else said) or not derived


@given(
    st.lists(st.text("abc ", min_size=1), unique=True, max_size=30), st.lists(st.text("abc ", min_size=1), max_size=10)
)
def test_what_is_chosen_is_never_near_what_is_held_out(questions: list[str], held_out: list[str]) -> None:
    examples, _ = choose([asked(q) for q in questions], held_out, prompted, 20)
    assert not near_duplicates([e.question for e in examples], held_out)


def test_what_is_nearly_asked_only_beside_what_is_replayed_is_left_out_and_does_not_end_the_run() -> None:
    held_out = ["who wrote the blue manual of turbines"]
    fresh = [example("who wrote the red manual of turbines"), *(example(f"fact{i} about thing{i}?") for i in range(11))]
    replayed = [example(f"which is red or blue item{i}") for i in range(4)]
    refuse_leaks(fresh, held_out, [])
    refuse_leaks(replayed, held_out, [])
    with pytest.raises(TrainingError, match="nearly the evaluation question"):
        refuse_leaks([*fresh, *replayed], held_out, [])
    both, left_out = joined(fresh, replayed, held_out)
    refuse_leaks(both, held_out, [])
    assert {e.question for e in [*fresh, *replayed]} - {e.question for e in both} == {fresh[0].question}
    assert left_out == {"nearly an evaluation question": 1}


@given(st.permutations([asked(f"Question {i}?") for i in range(12)]))
def test_the_same_pool_gives_the_same_set_in_whatever_order(pool: list[Asked]) -> None:
    first, _ = choose(sorted(pool, key=lambda a: a.question), [], prompted, 5)
    again, _ = choose(pool, [], prompted, 5)
    assert training_set_id(first) == training_set_id(again)


def test_a_leak_is_refused_by_its_question() -> None:
    with pytest.raises(TrainingError, match="nearly the evaluation question 'What is \\[core\\] parallelism for'"):
        refuse_leaks([example("what is [core] parallelism for?")], ["What is [core] parallelism for"], [])
    with pytest.raises(TrainingError, match="belongs to evaluation section 'core'"):
        refuse_leaks([example("Anything?", section="core")], [], ["core"])


def test_a_set_reads_back_as_it_was_written_and_not_when_a_row_was_lost(lake: Lake) -> None:
    examples = sorted((example(f"Question {i}?") for i in range(9)), key=lambda e: e.example_id)
    set_id = training_set_id(examples)
    rows = [{"training_set": set_id, **vars(e), "chunk_ids": list(e.chunk_ids)} for e in examples]
    lake.merge(GOLD_TRAINING_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema), run="t")
    assert read_training_set(lake, set_id) == examples
    with pytest.raises(TrainingError, match="train-none has 0 rows"):
        read_training_set(lake, "train-none")
    from deltalake import DeltaTable

    DeltaTable(lake.uri(GOLD_TRAINING_EXAMPLES)).delete(f"example_id = '{examples[0].example_id}'")
    with pytest.raises(TrainingError, match="8 rows"):
        read_training_set(lake, set_id)
