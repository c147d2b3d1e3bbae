"""What answering will cost a month: own model against paid APIs, development against production, and what each
shortening would save. The arithmetic is written out in `docs/cost.md`.

Pure: usage, speed and what the stages spend are handed in, measured (`cost_history.py`) or said by a person.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from millrace.errors import CostError
from millrace.monitoring.break_even import DAYS, HOURS, BreakEven, OwnModel, PaidApi, break_even
from millrace.policies import Plan, Prices, Stage, TokenPrice

DAY_SECONDS = 86_400.0
BOOKED = "as booked"
"""What `millrace cost` will show for the same answers: tokens at the prices of `[prices]`."""


@dataclass(frozen=True)
class Usage:
    """Mean tokens of an answer that was computed, and the share of answers that came from the cache instead."""

    prompt_tokens: float
    completion_tokens: float
    cached_share: float = 0.0

    def __post_init__(self) -> None:
        positive("prompt tokens per answer", self.prompt_tokens)
        positive("completion tokens per answer", self.completion_tokens)
        if not 0 <= self.cached_share < 1:
            raise CostError(
                f"the share of answers from the cache is {self.cached_share}; it must be 0 or more, below 1"
            )

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.completion_tokens

    def usd(self, price: TokenPrice) -> float:
        """Of one query."""
        return (1 - self.cached_share) * price.answer(self.prompt_tokens, self.completion_tokens)


@dataclass(frozen=True)
class Speed:
    """Seconds of one machine that is busy for one token of each kind."""

    prompt_token_seconds: float
    completion_token_seconds: float
    told_apart: bool
    """False: both kinds are taken to need the same time, so that a shorter prompt looks better than it is (prompt
    tokens are computed at once, those of an answer one after another)."""

    @classmethod
    def even(cls, tokens_per_second: float) -> "Speed":
        """One rate for both kinds."""
        seconds = 1 / positive("tokens per second", tokens_per_second)
        return cls(seconds, seconds, told_apart=False)

    def query_seconds(self, usage: Usage) -> float:
        """Of one query."""
        busy = usage.prompt_tokens * self.prompt_token_seconds + usage.completion_tokens * self.completion_token_seconds
        return (1 - usage.cached_share) * busy

    def tokens_per_second(self, usage: Usage) -> float:
        """Of answers like these."""
        return usage.tokens * (1 - usage.cached_share) / self.query_seconds(usage)


@dataclass(frozen=True)
class Spending:
    """What one stage does a month."""

    stage: Stage
    uses: float
    seconds: float
    """Of a machine."""
    tokens: float
    """Of a generator, both kinds; of embedding and training, of what was read."""
    cost_usd: float


@dataclass(frozen=True)
class Inputs:
    """Everything that a plan rests on."""

    queries_per_day: float
    usage: Usage
    speed: Speed
    policy: Plan
    prices: Prices
    spending: tuple[Spending, ...] = ()
    booked: TokenPrice | None = None
    """At which the measured answers are booked; None: none was measured."""

    def __post_init__(self) -> None:
        positive("queries per day", self.queries_per_day)


@dataclass(frozen=True)
class Line:
    """One way to answer, in US dollars a month."""

    name: str
    machines: int | None
    """None: it has none of its own."""
    development_usd: float
    """Embedding, fine-tunes, evaluations, studies of prompts."""
    serving_usd: float
    batch_usd: float
    production_usd: float
    """Serving and batch."""
    month_usd: float
    """Development and production."""
    thousand_answers_usd: float
    """All of it, for each thousand answers to users."""


@dataclass(frozen=True)
class Shortening:
    """A way to make answers shorter, alone."""

    name: str
    usage: Usage
    """With it."""


@dataclass(frozen=True)
class Saving:
    """What one shortening would save in US dollars a month, by the line's name."""

    name: str
    prompt_tokens: float
    """Fewer, per computed answer; so is the next."""
    completion_tokens: float
    machine_time: float
    """Share of the own model's busy time. It saves money only where a whole machine less is enough."""
    saved_usd: dict[str, float]


@dataclass(frozen=True)
class CostPlan:
    queries_per_day: float
    usage: Usage
    tokens_per_second: float
    """Of one busy machine, on these answers."""
    machine_queries_per_day: float
    """What one machine carries at the declared utilisation and peak."""
    lines: tuple[Line, ...]
    """The own model first, then the APIs by name; `BOOKED` last, where answers were measured."""
    cheapest: str
    break_even: tuple[BreakEven, ...]
    """Against each API."""
    savings: tuple[Saving, ...]
    unknown: tuple[Stage, ...]
    """Declared in `[plan.monthly]`, never recorded: their cost is not known and not counted."""


def plan(inputs: Inputs, shortenings: Sequence[Shortening] = ()) -> CostPlan:
    """What the load of `inputs` will cost each way.

    Raises:
        CostError: no machine price is declared.
    """
    load, usage = inputs.queries_per_day, inputs.usage
    own, apis = options(inputs, usage)
    ways: list[OwnModel | PaidApi] = [own, *apis]
    cheapest = min(ways, key=lambda way: way.month_usd(load)).name
    now = _lines(inputs, usage)
    return CostPlan(
        load,
        usage,
        inputs.speed.tokens_per_second(usage),
        own.capacity,
        now,
        cheapest,
        tuple(break_even(own, api) for api in apis),
        tuple(_saving(inputs, shortening, now) for shortening in shortenings),
        tuple(sorted(inputs.policy.monthly.keys() - {spent.stage for spent in inputs.spending})),
    )


def options(inputs: Inputs, usage: Usage) -> tuple[OwnModel, list[PaidApi]]:
    """The own model and each declared API, on answers of `usage`. What development and batch cost rests on the
    answers of `inputs`: a shortening changes answers to users.

    An API trains nothing. Tokens of evaluations, studies and batches would be its own, so they are counted at its
    price, split into prompt and completion as answers are; machine time stays what it is.

    Raises:
        CostError: no machine price is declared.
    """
    policy = inputs.policy
    if policy.machine_hour is None:
        raise CostError(
            "the own model has no machine price: add `machine_hour` to [plan] in the application's declaration, in "
            "US dollars for an hour of the machine that answers"
        )
    seconds = inputs.speed.query_seconds(usage)
    own = OwnModel(
        machine_usd=policy.machine_hour * HOURS,
        capacity=DAY_SECONDS * policy.utilisation / (policy.peak_factor * seconds),
        minimum_machines=policy.minimum_machines,
        development_usd=_development(inputs.spending),
        batch_usd=_batch(inputs.spending),
    )
    apis = []
    for name, price in sorted(policy.apis.items()):
        mean = price.answer(inputs.usage.prompt_tokens, inputs.usage.completion_tokens) / inputs.usage.tokens
        spending = [_at(spent, mean, inputs.prices) for spent in inputs.spending if spent.stage != "training"]
        apis.append(PaidApi(name, usage.usd(price), _development(spending), _batch(spending)))
    return own, apis


def shorter_prompt(usage: Usage, share: float) -> Shortening:
    """`share` of the prompt's tokens less, as prompt compression promises.

    Raises:
        CostError: it isn't between 0 and 1.
    """
    if not 0 < share < 1:
        raise CostError(f"{share} is no share of the prompt's tokens; give one above 0 and below 1, 0.2 for 20 % less")
    return Shortening(f"prompt {share:.0%} shorter", replace(usage, prompt_tokens=usage.prompt_tokens * (1 - share)))


def one_chunk_less(usage: Usage, chunk_tokens: float) -> Shortening | None:
    """The worst retrieved chunk left out; None: the prompts have no room for one of this size."""
    if not 0 < chunk_tokens < usage.prompt_tokens:
        return None
    return Shortening("one chunk less", replace(usage, prompt_tokens=usage.prompt_tokens - chunk_tokens))


def capped_answers(usage: Usage, most: int, lengths: Mapping[int, int]) -> Shortening:
    """Answers of at most so many tokens.

    Args:
        lengths: completion tokens → answers of that length; empty: unknown. Then all are taken to be as long as the
            mean, which understates what a cap saves.

    Raises:
        CostError: no answer has 0 tokens or less.
    """
    positive("most tokens of an answer", most)
    answers, tokens = sum(lengths.values()), sum(length * n for length, n in lengths.items())
    if tokens:
        # Of the plan's answers, which may be longer than the recorded ones, spread as those are.
        scale = usage.completion_tokens * answers / tokens
        after = sum(min(length * scale, most) * n for length, n in lengths.items()) / answers
    else:
        after = min(usage.completion_tokens, most)
    return Shortening(f"answers of {most} tokens at most", replace(usage, completion_tokens=after))


def positive(what: str, value: float) -> float:
    """`value` itself.

    Raises:
        CostError: it is no number above 0.
    """
    if not (math.isfinite(value) and value > 0):
        raise CostError(f"{what}: {value:g} can't be planned with; give a number above 0")
    return value


def _lines(inputs: Inputs, usage: Usage) -> tuple[Line, ...]:
    load = inputs.queries_per_day
    own, apis = options(inputs, usage)
    ways: list[OwnModel | PaidApi] = [own, *apis]
    if inputs.booked:
        ways.append(PaidApi(BOOKED, usage.usd(inputs.booked), own.development_usd, own.batch_usd))
    return tuple(
        Line(
            way.name,
            way.machines(load) if isinstance(way, OwnModel) else None,
            way.development_usd,
            way.serving_usd(load),
            way.batch_usd,
            way.serving_usd(load) + way.batch_usd,
            way.month_usd(load),
            way.month_usd(load) / (load * DAYS) * 1000,
        )
        for way in ways
    )


def _saving(inputs: Inputs, shortening: Shortening, now: Sequence[Line]) -> Saving:
    before, after = inputs.usage, shortening.usage
    shorter = _lines(inputs, after)
    return Saving(
        shortening.name,
        before.prompt_tokens - after.prompt_tokens,
        before.completion_tokens - after.completion_tokens,
        1 - inputs.speed.query_seconds(after) / inputs.speed.query_seconds(before),
        {old.name: old.month_usd - new.month_usd for old, new in zip(now, shorter, strict=True)},
    )


def _at(spent: Spending, token_usd: float, prices: Prices) -> Spending:
    """What a stage would spend if a generator's tokens cost `token_usd` each."""
    if spent.stage == "embedding":
        return spent
    return replace(spent, cost_usd=prices.machine(spent.stage, spent.seconds) + spent.tokens * token_usd)


def _development(spending: Sequence[Spending]) -> float:
    return sum(spent.cost_usd for spent in spending if spent.stage != "batch")


def _batch(spending: Sequence[Spending]) -> float:
    return sum(spent.cost_usd for spent in spending if spent.stage == "batch")
