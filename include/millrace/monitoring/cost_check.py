"""A plan of costs against what happened: planned from one period of an application, compared with the next.

Pure: both periods are handed in.
"""

from dataclasses import dataclass, field

from millrace.errors import CostError
from millrace.monitoring.break_even import DAYS, OwnModel, PaidApi
from millrace.monitoring.cost_history import History, inputs_of
from millrace.monitoring.cost_plan import Inputs, options


@dataclass(frozen=True)
class Compared:
    """One number of the plan, and what was recorded."""

    what: str
    unit: str
    predicted: float
    recorded: float
    error: float | None = field(init=False)
    """Relative to what was recorded, positive where the plan said too much; None where that is 0."""

    def __post_init__(self) -> None:
        error = (self.predicted - self.recorded) / self.recorded if self.recorded else None
        object.__setattr__(self, "error", error)


@dataclass(frozen=True)
class Check:
    days: float
    """That were predicted."""
    planned_from: dict[str, int]
    """Answers that the plan rests on, by the release that gave them. Releases differ in tokens and speed, so a check
    across a rollout shows the rollout, too."""
    recorded: dict[str, int]
    """Answers of the predicted days, the same way."""
    rows: tuple[Compared, ...]


def check(inputs: Inputs, earlier: History, later: History) -> Check:
    """The plan that `inputs` make, over the length of `later`, against what `later` recorded.

    Answers, tokens, busy time and dollars rest on the load, too; the rows "per answer" leave its error out. Lines of
    the own model and of APIs, where their prices are declared, compare the plan on its own inputs with the plan on
    what was recorded. Development compares each stage's dollars.

    Args:
        inputs: made from `earlier`, and from what a person said.

    Raises:
        CostError: nothing was answered in `later`, or no time went by.
    """
    real = later.answers
    usage = real.usage
    if usage is None or not real.days:
        raise CostError(
            f"nothing was answered between {later.period.since} and {later.period.until or 'now'}: there is nothing to "
            "check against; give --check an earlier moment"
        )
    expected = inputs.queries_per_day * real.days
    computed = expected * (1 - inputs.usage.cached_share)
    rows = [
        Compared("prompt tokens per computed answer", "tokens", inputs.usage.prompt_tokens, usage.prompt_tokens),
        Compared(
            "completion tokens per computed answer",
            "tokens",
            inputs.usage.completion_tokens,
            usage.completion_tokens,
        ),
        Compared("answers", "answers", expected, real.count),
        Compared("prompt tokens", "tokens", computed * inputs.usage.prompt_tokens, real.prompt_tokens),
        Compared("completion tokens", "tokens", computed * inputs.usage.completion_tokens, real.completion_tokens),
        Compared("busy time", "seconds", expected * inputs.speed.query_seconds(inputs.usage), real.busy_seconds),
    ]
    if inputs.booked:
        per_answer = inputs.usage.usd(inputs.booked)
        rows += [
            Compared("answers as booked, per 1,000", "USD", per_answer * 1000, real.cost_usd / real.count * 1000),
            Compared("answers as booked", "USD", per_answer * expected, real.cost_usd),
        ]
    if inputs.policy.machine_hour is not None:
        rows += _ways(inputs, later)
    return Check(real.days, earlier.answers.by_version, real.by_version, (*rows, *_development(inputs, earlier, later)))


def _ways(inputs: Inputs, later: History) -> list[Compared]:
    """Serving with each declared price, on the plan's inputs and on what was recorded."""
    recorded = inputs_of(later, inputs.policy, inputs.prices, shortest_days=0)
    planned, real = _serving(inputs), _serving(recorded)
    months = later.answers.days / DAYS
    return [Compared(f"serving, {name}", "USD", planned[name] * months, real[name] * months) for name in planned]


def _serving(inputs: Inputs) -> dict[str, float]:
    own, apis = options(inputs, inputs.usage)
    ways: list[OwnModel | PaidApi] = [own, *apis]
    return {way.name: way.serving_usd(inputs.queries_per_day) for way in ways}


def _development(inputs: Inputs, earlier: History, later: History) -> list[Compared]:
    """Each stage: at its declared frequency, or as often as in the earlier period."""
    before = {use.stage: use for use in earlier.stages}
    after = {use.stage: use.cost_usd for use in later.stages}
    rows = []
    for stage in sorted(before.keys() | after.keys()):
        predicted = 0.0
        if stage in before and stage in inputs.policy.monthly:
            uses = inputs.policy.monthly[stage] * later.days / DAYS
            predicted = before[stage].cost_usd / before[stage].uses * uses
        elif stage in before and earlier.days:
            predicted = before[stage].cost_usd * later.days / earlier.days
        rows.append(Compared(stage, "USD", predicted, after.get(stage, 0.0)))
    return rows
