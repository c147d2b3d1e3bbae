"""Great Expectations as a sieve: which rows of a batch may go on, and why the others may not.

Suites are declared here as data; a stage asks `refused` and sends those rows to quarantine. Knows nothing of
where the rows came from. Great Expectations is imported on first use: it costs several seconds.
"""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pyarrow as pa

from millrace.errors import LakehouseError


@dataclass(frozen=True)
class Rule:
    """One expectation on one column, by its name in `great_expectations.expectations`."""

    column: str
    expectation: str
    reason: str
    """Why a row is refused; sees the `{value}`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Rules over a batch whose rows are told apart by the column `key`."""

    name: str
    key: str
    rules: tuple[Rule, ...]


def _issued() -> tuple[Rule, ...]:
    """What every event of an application must satisfy. `signed` and `own` say what the signature of its id says."""
    true: dict[str, Any] = {"value_set": [True]}
    return (
        Rule(
            "event_id",
            "ExpectColumnValuesToMatchRegex",
            "event id {value!r} is not 32 hexadecimal digits",
            {"regex": r"^[0-9a-f]{32}\Z"},
        ),
        Rule("signed", "ExpectColumnValuesToBeInSet", "the completion id was not issued by this deployment", true),
        Rule("own", "ExpectColumnValuesToBeInSet", "the completion id belongs to another application", true),
    )


LONGEST_REMARK = 4000
"""Characters of a comment or a correction."""

FEEDBACK = Suite(
    "feedback",
    "event_id",
    (
        *_issued(),
        Rule("rating", "ExpectColumnValuesToNotBeNull", "the rating is missing or not a number"),
        Rule(
            "rating",
            "ExpectColumnValuesToBeBetween",
            "rating {value} is not between 0 and 1",
            {"min_value": 0, "max_value": 1},
        ),
        *(
            Rule(
                column,
                "ExpectColumnValueLengthsToBeBetween",
                f"the {column} is longer than {LONGEST_REMARK} characters",
                {"max_value": LONGEST_REMARK},
            )
            for column in ("comment", "correction")
        ),
    ),
)
"""On feedback events."""

EXCHANGES = Suite(
    "exchanges",
    "event_id",
    (
        *_issued(),
        Rule(
            "kind",
            "ExpectColumnValuesToBeInSet",
            "kind {value!r} is not one of an exchange",
            {"value_set": ["accepted", "completed", "failed"]},
        ),
        Rule(
            "user",
            "ExpectColumnValuesToMatchRegex",
            "the user is stored as {value!r}, which is no pseudonym",
            {"regex": r"^[0-9a-f]{32}\Z"},
        ),
        Rule("question", "ExpectColumnValuesToMatchRegex", "the question is empty", {"regex": r"\S"}),
        Rule("release_version", "ExpectColumnValuesToMatchRegex", "no release is named", {"regex": r"\S"}),
        Rule(
            "assignment_probability",
            "ExpectColumnValuesToBeBetween",
            "assignment probability {value} is not between 0 and 1",
            {"min_value": 0, "max_value": 1},
        ),
        *(
            Rule(column, "ExpectColumnValuesToBeBetween", f"{column} {{value}} is negative", {"min_value": 0})
            for column in ("prompt_tokens", "completion_tokens", "seconds", "cost_usd")
        ),
    ),
)
"""On accepted, completed and failed events."""


def refused(rows: pa.Table, suite: Suite) -> dict[str, str]:
    """Key of each row that breaks a rule of `suite` → the reasons, as one sentence. Rows not named may go on.

    Raises:
        LakehouseError: a rule could not be evaluated (a column is missing, or of a type it does not fit).
    """
    if not rows.num_rows:
        return {}
    import great_expectations as gx

    expectations = [
        getattr(gx.expectations, rule.expectation)(column=rule.column, meta={"rule": number}, **rule.arguments)
        for number, rule in enumerate(suite.rules)
    ]
    batch = _batches().get_batch({"dataframe": rows.to_pandas()})
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        result = batch.validate(
            gx.ExpectationSuite(name=suite.name, expectations=expectations),
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [suite.key]},
        )
    reasons: dict[str, list[str]] = {}
    for outcome in result.results:
        rule = suite.rules[outcome.expectation_config.meta["rule"]]
        if "unexpected_index_list" not in outcome.result:
            raise LakehouseError(
                f"quality rule {suite.name}/{rule.column}/{rule.expectation} could not be evaluated: "
                f"{_exception(outcome.exception_info)}"
            )
        for row in outcome.result["unexpected_index_list"] or []:
            reasons.setdefault(row[suite.key], []).append(rule.reason.format(value=row.get(rule.column)))
    return {key: "; ".join(found) for key, found in reasons.items()}


@cache
def _batches() -> Any:
    """One context in memory for the process; it keeps nothing of the batches. Sends nothing to anybody."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults

    context = gx.get_context(
        mode="ephemeral",
        project_config=DataContextConfig(
            analytics_enabled=False, store_backend_defaults=InMemoryStoreBackendDefaults()
        ),
    )
    return (
        context.data_sources.add_pandas("rows").add_dataframe_asset("rows").add_batch_definition_whole_dataframe("rows")
    )


def _exception(info: Mapping[str, Any]) -> str:
    """The message in GX's exception info, which is nested by metric when several failed."""
    if "exception_message" in info:
        return str(info["exception_message"])
    return "; ".join(sorted({str(part.get("exception_message")) for part in info.values()})) or "no reason was given"
