"""Great Expectations refuses what a rule names, with the reason, and nothing else."""

import math
import subprocess
import sys

import pyarrow as pa
import pytest

from millrace.errors import LakehouseError
from millrace.lakehouse.quality import EXCHANGES, FEEDBACK, LONGEST_REMARK, Rule, Suite, refused

pytestmark = pytest.mark.slow


def key(number: int) -> str:
    return f"{number:032x}"


def feedback(**changes: object) -> dict[str, object]:
    return {"signed": True, "own": True, "rating": 0.5, "comment": None, "correction": None} | changes


def exchange(**changes: object) -> dict[str, object]:
    return {
        "signed": True,
        "own": True,
        "kind": "completed",
        "user": "0" * 32,
        "question": "why?",
        "release_version": "1",
        "assignment_probability": None,
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "seconds": 0.1,
        "cost_usd": 0.0,
    } | changes


FEEDBACK_TYPES = pa.schema(
    [
        ("event_id", pa.string()),
        ("signed", pa.bool_()),
        ("own", pa.bool_()),
        ("rating", pa.float64()),
        ("comment", pa.string()),
        ("correction", pa.string()),
    ]
)
EXCHANGE_TYPES = pa.schema(
    [
        ("event_id", pa.string()),
        ("signed", pa.bool_()),
        ("own", pa.bool_()),
        ("kind", pa.string()),
        ("user", pa.string()),
        ("question", pa.string()),
        ("release_version", pa.string()),
        ("assignment_probability", pa.float64()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("cost_usd", pa.float64()),
    ]
)


def batch(rows: list[dict[str, object]], types: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([{"event_id": key(n)} | row for n, row in enumerate(rows)], schema=types)


def test_bad_feedback_is_refused_with_its_reason_and_good_feedback_goes_on() -> None:
    cases = [
        (feedback(), None),
        (feedback(rating=0), None),
        (feedback(rating=1, comment="ß" * LONGEST_REMARK, correction="better"), None),
        (feedback(rating=1.5), "rating 1.5 is not between 0 and 1"),
        (feedback(rating=-0.1), "rating -0.1 is not between 0 and 1"),
        (feedback(rating=math.inf), "rating inf is not between 0 and 1"),
        (feedback(rating=math.nan), "the rating is missing or not a number"),
        (feedback(rating=None), "the rating is missing or not a number"),
        (feedback(comment="x" * (LONGEST_REMARK + 1)), "the comment is longer than 4000 characters"),
        (feedback(signed=False), "the completion id was not issued by this deployment"),
        (
            feedback(own=False, rating=7),
            "the completion id belongs to another application; rating 7.0 is not between 0 and 1",
        ),
    ]
    found = refused(batch([row for row, _ in cases], FEEDBACK_TYPES), FEEDBACK)
    assert found == {key(n): reason for n, (_, reason) in enumerate(cases) if reason}


def test_bad_exchanges_are_refused_with_their_reason() -> None:
    cases = [
        (exchange(), None),
        (exchange(assignment_probability=0.25, seconds=None, prompt_tokens=None), None),
        (exchange(question=" \n"), "the question is empty"),
        (exchange(user="ann@example.org"), "the user is stored as 'ann@example.org', which is no pseudonym"),
        (exchange(kind="party"), "kind 'party' is not one of an exchange"),
        (exchange(assignment_probability=1.5), "assignment probability 1.5 is not between 0 and 1"),
        (exchange(seconds=-1), "seconds -1.0 is negative"),
    ]
    found = refused(batch([row for row, _ in cases], EXCHANGE_TYPES), EXCHANGES)
    assert found == {key(n): reason for n, (_, reason) in enumerate(cases) if reason}


def test_columns_that_hold_nothing_but_nulls_are_fine() -> None:
    assert refused(batch([feedback()] * 2, FEEDBACK_TYPES), FEEDBACK) == {}


def test_a_rule_that_cannot_be_evaluated_is_an_error_and_lets_nothing_pass() -> None:
    suite = Suite("broken", "event_id", (Rule("absent", "ExpectColumnValuesToNotBeNull", "absent"),))
    with pytest.raises(LakehouseError, match="broken/absent"):
        refused(batch([feedback()], FEEDBACK_TYPES), suite)


def test_importing_the_module_does_not_import_great_expectations() -> None:
    program = "import sys, millrace.lakehouse.quality as q; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
