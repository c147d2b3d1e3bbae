"""Near-duplicates of questions: found through dressing-up, not between questions made from one pattern."""

from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from millrace.scoring.duplicates import near_duplicates

PATTERN = "What is the default value of the option {} in section [{}] of Airflow's configuration?"
OPTIONS = ["parallelism", "max_active_runs", "dags_folder", "hostname_callable", "executor", "load_examples"]

questions = st.lists(st.text(st.characters(codec="ascii"), min_size=1).filter(str.strip), min_size=1, max_size=8)


@budget(max_examples=60, deadline=None)
@given(questions)
def test_every_question_is_a_duplicate_of_itself(texts):
    assert set(near_duplicates(texts, texts)) == set(range(len(texts)))


@budget(max_examples=60, deadline=None)
@given(questions, questions)
def test_what_is_found_are_positions_of_both_lists(texts, held_out):
    found = near_duplicates(texts, held_out)
    assert all(0 <= a < len(texts) and 0 <= b < len(held_out) for a, b in found.items())


def test_case_punctuation_and_a_word_more_do_not_hide_a_question():
    held_out = [PATTERN.format(option, "core") for option in OPTIONS]
    asked = [
        "what is the default value of the option parallelism in section core of airflow's configuration",
        "Please, " + PATTERN.format("executor", "core"),
    ]
    assert near_duplicates(asked, held_out) == {0: 0, 1: 4}


def test_questions_from_one_pattern_about_different_options_are_different():
    held_out = [PATTERN.format(option, "core") for option in OPTIONS]
    assert near_duplicates([PATTERN.format(f"{option}_limit", "core") for option in OPTIONS], held_out) == {}


def test_the_same_option_of_another_section_is_another_question():
    held_out = [PATTERN.format("ssl_active", "celery"), *(PATTERN.format(option, "core") for option in OPTIONS)]
    assert near_duplicates([PATTERN.format("ssl_active", "smtp")], held_out) == {}


def test_nothing_has_no_duplicates():
    assert near_duplicates([], ["a question"]) == near_duplicates(["a question"], []) == {}
