"""What a plan of costs measures in the lake: how many answers, of how many tokens, in how much time, and what the
stages spent beside them. Only what happened: `cost_plan.py` counts with it.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace.errors import CostError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS, SILVER_CHUNKS, SILVER_EXCHANGES, Table
from millrace.monitoring.break_even import DAYS
from millrace.monitoring.cost_plan import Inputs, Speed, Spending, Usage
from millrace.policies import Plan, Prices, Stage, TokenPrice

Floats = npt.NDArray[np.float64]

ENOUGH = 30
"""Answers from which a slope is told."""
CLEAR = 2.0
"""Standard errors that a slope must lie above 0."""


@dataclass(frozen=True)
class Period:
    """From a moment, up to another (not included); None: open."""

    since: datetime | None = None
    until: datetime | None = None

    @classmethod
    def of(cls, since: datetime | None, until: datetime | None) -> "Period":
        """UTC where a moment has no zone.

        Raises:
            CostError: it is empty.
        """
        period = cls(_utc(since), _utc(until))
        if period.since is not None and period.until is not None and period.since >= period.until:
            raise CostError(f"nothing lies between {period.since} and {period.until}: give an earlier --since")
        return period

    def split(self, at: datetime) -> tuple["Period", "Period"]:
        """What was before a moment, and what was from it on.

        Raises:
            CostError: one of them is empty.
        """
        return Period.of(self.since, at), Period.of(at, self.until)


@dataclass(frozen=True)
class Answers:
    """Completed exchanges of a period. Failed ones are recorded without tokens and are not among them."""

    count: int
    cached: int
    """Of them, from the gateway's cache: neither computed nor paid."""
    simulated: int
    """Of them, to users that are programs."""
    by_version: dict[str, int]
    """Of them, by the release that answered."""
    days: float
    """From the period's beginning, or the first answer, to its end, or whatever was recorded last."""
    prompt_tokens: int
    """Of computed answers, all together; so is the next."""
    completion_tokens: int
    lengths: dict[int, int]
    """Completion tokens → computed answers of that length."""
    seconds: float
    """Of computed answers, each from question to last token, added up."""
    busy_seconds: float
    """Time in which at least one answer was being computed."""
    speed: Speed | None
    """What the machines did in their busy time, all of them together: with answers one by one it is the speed of one
    stream, with some at once that of so many (`at_once`). Neither is what a saturated machine can do, which is more;
    and it is the speed of one machine only where one answered. None: nothing was computed."""
    chunk_tokens: float | None
    """Prompt tokens of the worst cited chunk, in the mean; None: not to be told."""
    booked: TokenPrice | None
    """The declared price nearest to what was booked, by release, weighted by tokens; None: nothing was computed."""
    cost_usd: float
    """As booked."""

    @property
    def computed(self) -> int:
        return self.count - self.cached

    @property
    def usage(self) -> Usage | None:
        """Means; None where nothing was computed."""
        if not self.computed or not self.prompt_tokens or not self.completion_tokens:
            return None
        prompt, completion = self.prompt_tokens / self.computed, self.completion_tokens / self.computed
        return Usage(prompt, completion, self.cached / self.count)

    @property
    def at_once(self) -> float:
        """Answers that were being computed in busy time, in the mean."""
        return self.seconds / self.busy_seconds if self.busy_seconds else 0.0


@dataclass(frozen=True)
class StageUse:
    """What one stage did in a period."""

    stage: Stage
    uses: int
    """Fine-tunes, evaluations, studies; of embedding and batch, runs."""
    seconds: float
    tokens: int
    cost_usd: float

    def times(self, factor: float) -> Spending:
        """This, so many times."""
        values = (self.uses, self.seconds, self.tokens, self.cost_usd)
        return Spending(self.stage, *(value * factor for value in values))


@dataclass(frozen=True)
class History:
    """One period of an application."""

    period: Period
    days: float
    """From the period's beginning, or the first thing recorded, to its end, or the last thing recorded."""
    answers: Answers
    stages: tuple[StageUse, ...]


def read_history(lake: Lake, prices: Prices, period: Period) -> History:
    """What `period` holds."""
    columns = [
        "release_id",
        "release_version",
        "occurred_at",
        "simulated",
        "from_cache",
        "citations",
        "question",
        "prompt_tokens",
        "completion_tokens",
        "seconds",
        "cost_usd",
    ]
    answers = lake.read(
        SILVER_EXCHANGES, columns, where=_within(SILVER_EXCHANGES, period) & (pc.field("state") == "completed")
    )
    spent = lake.read(OPS_COSTS, where=_within(OPS_COSTS, period)).to_pylist()
    moments = [*answers["occurred_at"].to_pylist(), *(row["at"] for row in spent)]
    end = period.until or max(moments, default=None)
    begin, first = (period.since or min(those, default=None) for those in (moments, answers["occurred_at"].to_pylist()))
    return History(
        period,
        _days(begin, end),
        _answers(answers, _days(first, end), prices, _chunk_lengths(lake, answers)),
        tuple(_stages(spent)),
    )


def monthly(history: History, policy: Plan) -> tuple[Spending, ...]:
    """What each stage spends a month: a mean use, as often as declared, or else as often as it was recorded. A history
    shorter than a month counts as a whole one: what happened in a week is not known to happen every week."""
    months = max(history.days / DAYS, 1.0)
    return tuple(
        stage.times(policy.monthly[stage.stage] / stage.uses if stage.stage in policy.monthly else 1 / months)
        for stage in history.stages
    )


def inputs_of(
    history: History,
    policy: Plan,
    prices: Prices,
    *,
    queries_per_day: float | None = None,
    prompt_tokens: float | None = None,
    completion_tokens: float | None = None,
    tokens_per_second: float | None = None,
    shortest_days: float = 1.0,
) -> Inputs:
    """What a plan rests on: what a person says, and the rest as `history` measured it.

    Args:
        shortest_days: answers over less time than this don't tell a load.

    Raises:
        CostError: what isn't said can't be measured, or something said is no number above 0.
    """
    answers = history.answers
    usage = _usage(answers, prompt_tokens, completion_tokens)
    if queries_per_day is None:
        if answers.days < shortest_days or not answers.days:
            raise CostError(
                f"{answers.count} answers over {answers.days * 24:.2f} hours don't tell the load of a day: give "
                "--queries-per-day"
            )
        queries_per_day = answers.count / answers.days
    given = tokens_per_second if tokens_per_second is not None else policy.tokens_per_second
    speed = Speed.even(given) if given is not None else answers.speed
    if speed is None:
        raise CostError(
            "no throughput was measured, since no answer was computed: give --tokens-per-second, or declare "
            "tokens_per_second in [plan]"
        )
    return Inputs(queries_per_day, usage, speed, policy, prices, monthly(history, policy), answers.booked)


def busy(starts: Floats, ends: Floats) -> float:
    """Length of the union of intervals."""
    if not len(starts):
        return 0.0
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    covered = np.concatenate(([starts[0]], np.maximum.accumulate(ends)[:-1]))
    return float(np.sum(np.maximum(ends - np.maximum(starts, covered), 0.0)))


def measured_speed(prompt: Floats, completion: Floats, seconds: Floats, busy_seconds: float) -> Speed:
    """Least squares of each answer's seconds on its tokens of both kinds, scaled to the busy time of all of them.
    Where a kind's time is not clearly above 0 the two can't be told apart: one rate for both.

    Args:
        prompt: tokens of each answer; so is the next.
        completion: at least one token in all.
        seconds: of each answer.
        busy_seconds: above 0.
    """
    slopes = _slopes(np.column_stack([prompt, completion]), seconds)
    if slopes is None:
        return Speed.even(float(prompt.sum() + completion.sum()) / busy_seconds)
    fitted = float(prompt.sum() * slopes[0] + completion.sum() * slopes[1])
    scale = busy_seconds / fitted
    return Speed(float(slopes[0]) * scale, float(slopes[1]) * scale, told_apart=True)


def _slopes(columns: Floats, values: Floats) -> Floats | None:
    """Ordinary least squares without an intercept; None unless every slope is clearly above 0.

    Args:
        columns: (n, k).
        values: (n,).
    """
    n, k = columns.shape
    if n < ENOUGH or np.linalg.matrix_rank(columns) < k:
        return None
    gram = np.linalg.inv(columns.T @ columns)
    slopes: Floats = gram @ columns.T @ values
    variance = np.sum((values - columns @ slopes) ** 2) / (n - k)
    errors = np.sqrt(variance * np.diag(gram))
    return slopes if bool(np.all(slopes > CLEAR * errors)) and bool(np.all(slopes > 0)) else None


def _usage(answers: Answers, prompt_tokens: float | None, completion_tokens: float | None) -> Usage:
    measured = answers.usage
    if measured is None:
        if prompt_tokens is None or completion_tokens is None:
            raise CostError(
                "no answer was computed, so its tokens are not known: give --prompt-tokens and --completion-tokens"
            )
        return Usage(prompt_tokens, completion_tokens)
    return Usage(
        measured.prompt_tokens if prompt_tokens is None else prompt_tokens,
        measured.completion_tokens if completion_tokens is None else completion_tokens,
        measured.cached_share,
    )


def _answers(rows: pa.Table, days: float, prices: Prices, chunks: dict[str, int]) -> Answers:
    computed = rows.filter(pc.invert(rows["from_cache"]))
    prompt, completion = (_numbers(computed, name) for name in ("prompt_tokens", "completion_tokens"))
    seconds = _numbers(computed, "seconds")
    begun = pc.cast(computed["occurred_at"], pa.int64()).to_numpy() / 1e6
    busy_seconds = busy(begun, begun + seconds)
    timed = busy_seconds > 0 and prompt.sum() + completion.sum() > 0
    return Answers(
        count=rows.num_rows,
        cached=rows.num_rows - computed.num_rows,
        simulated=pc.sum(rows["simulated"]).as_py() or 0,
        by_version=dict(sorted(Counter(rows["release_version"].to_pylist()).items())),
        days=days,
        prompt_tokens=int(prompt.sum()),
        completion_tokens=int(completion.sum()),
        lengths=dict(sorted(Counter(completion.astype(int).tolist()).items())),
        seconds=float(seconds.sum()),
        busy_seconds=busy_seconds,
        speed=measured_speed(prompt, completion, seconds, busy_seconds) if timed else None,
        chunk_tokens=_chunk_tokens(computed, chunks),
        booked=_booked(computed, prices),
        cost_usd=float(pc.sum(rows["cost_usd"]).as_py() or 0.0),
    )


def _booked(computed: pa.Table, prices: Prices) -> TokenPrice | None:
    """Exchanges don't name their generator; what they cost says which declared price was theirs."""
    totals = computed.group_by("release_id").aggregate(
        [(name, "sum") for name in ("prompt_tokens", "completion_tokens", "cost_usd")]
    )
    paid: list[tuple[float, float, TokenPrice]] = []
    for row in totals.to_pylist():
        prompt, completion = row["prompt_tokens_sum"], row["completion_tokens_sum"]
        differences = [abs(price.answer(prompt, completion) - row["cost_usd_sum"]) for price in prices.declared]
        paid.append((prompt, completion, prices.declared[int(np.argmin(differences))]))
    prompts, completions = sum(prompt for prompt, _, _ in paid), sum(completion for _, completion, _ in paid)
    if not prompts or not completions:
        return None
    return TokenPrice(
        prompt_million_tokens=sum(p * price.prompt_million_tokens for p, _, price in paid) / prompts,
        completion_million_tokens=sum(c * price.completion_million_tokens for _, c, price in paid) / completions,
    )


def _chunk_tokens(computed: pa.Table, chunks: dict[str, int]) -> float | None:
    """Prompts of one release differ by question and chunks alone, so the slope of their tokens on those characters is
    what a character takes; the last citation is the worst chunk. What a template writes around a chunk is not counted.
    """
    groups: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for row in computed.select(["release_id", "question", "citations", "prompt_tokens"]).to_pylist():
        cited = row["citations"]
        if cited and all(chunk in chunks for chunk in cited):
            characters = len(row["question"]) + sum(chunks[chunk] for chunk in cited)
            groups[row["release_id"]].append((characters, row["prompt_tokens"], chunks[cited[-1]]))
    if not groups:
        return None
    measured = [np.array(rows, dtype=float) for rows in groups.values()]
    centred = np.concatenate([rows - rows.mean(axis=0) for rows in measured])
    slopes = _slopes(centred[:, :1], centred[:, 1])
    if slopes is None:
        return None
    return float(slopes[0] * np.concatenate(measured)[:, 2].mean())


def _chunk_lengths(lake: Lake, answers: pa.Table) -> dict[str, int]:
    """Characters of each cited chunk that is still there."""
    cited = pc.unique(pc.list_flatten(answers["citations"])).to_pylist()
    if not cited:
        return {}
    rows = lake.read(SILVER_CHUNKS, ["chunk_id", "text"], where=pc.field("chunk_id").isin(cited))
    lengths = pc.utf8_length(rows["text"]).to_pylist()
    return dict(zip(rows["chunk_id"].to_pylist(), lengths, strict=True))


def _stages(spent: Sequence[dict[str, Any]]) -> list[StageUse]:
    groups: dict[Stage, list[dict[str, Any]]] = defaultdict(list)
    for row in spent:
        groups[row["stage"]].append(row)
    return [
        StageUse(
            stage,
            # Embedding and batch go on and on about one subject; each run of theirs is a use.
            len({row["written_by" if stage in ("embedding", "batch") else "subject"] for row in rows}),
            sum(row["seconds"] for row in rows),
            sum(row["tokens"] for row in rows),
            sum(row["cost_usd"] for row in rows),
        )
        for stage, rows in sorted(groups.items())
    ]


def _within(table: Table, period: Period) -> pc.Expression:
    """Rows of `table` in `period`: what began then."""
    at = "occurred_at" if table is SILVER_EXCHANGES else "at"
    conditions = [pc.field(at).is_valid()]
    if period.since is not None:
        conditions.append(pc.field(at) >= period.since)
    if period.until is not None:
        conditions.append(pc.field(at) < period.until)
    if table is SILVER_EXCHANGES:  # leaves out whole files
        if period.since is not None:
            conditions.append(pc.field("date") >= period.since.astimezone(UTC).date())
        if period.until is not None:
            conditions.append(pc.field("date") <= period.until.astimezone(UTC).date())
    return reduce(lambda one, other: one & other, conditions)


def _utc(at: datetime | None) -> datetime | None:
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at


def _days(begin: datetime | None, end: datetime | None) -> float:
    return 0.0 if begin is None or end is None else max(end - begin, timedelta(0)) / timedelta(days=1)


def _numbers(rows: pa.Table, name: str) -> Floats:
    return np.asarray(pc.fill_null(rows[name], 0).to_numpy(), dtype=float)
