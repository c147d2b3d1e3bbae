"""What an application declares of money, of what may not go wrong, and of who sees what: prices, what a plan of costs
counts with, bounds on what is watched, and staging's share of prod.

Parts of a declaration (`applications.py`), as data; prices know how to count, and a sample, whom it takes. Nothing here
knows a release or a table.
"""

import hashlib
from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from millrace.errors import SettingsError

STRATUM = r"^(section/.+|source/.+|rating/(bad|good|none))$"


class Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenPrice(Policy):
    """Of one generator, in US dollars."""

    prompt_million_tokens: float = Field(ge=0, allow_inf_nan=False)
    completion_million_tokens: float = Field(ge=0, allow_inf_nan=False)

    def answer(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What one answer, or the sum of many, costs in US dollars."""
        return (
            prompt_tokens * self.prompt_million_tokens + completion_tokens * self.completion_million_tokens
        ) / 1_000_000


Stage = Literal["embedding", "training", "evaluation", "optimisation", "batch"]
"""What is paid for beside answers to users."""


class Prices(Policy):
    """What the cost criterion and the cost tables count with, in US dollars."""

    prompt_million_tokens: float | None = Field(0.02, ge=0)
    """With the next one: of every generator that `models` does not name. Where it names any, there is no default."""
    completion_million_tokens: float | None = Field(0.06, ge=0)
    models: dict[str, TokenPrice] = {}
    """By how a generator's name begins, so that fine-tunes cost what their base does; the longest that fits counts."""
    embedding_hour: float = Field(0.10, ge=0)
    """Of a machine; this one and those below."""
    training_hour: float = Field(0.10, ge=0)
    evaluation_hour: float = Field(0.0, ge=0)
    """Beside the tokens of its answers, as the next two: for machines that are rented for it."""
    optimisation_hour: float = Field(0.0, ge=0)
    batch_hour: float = Field(0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _named_ones_leave_no_default(cls, declared: Any) -> Any:
        if isinstance(declared, dict) and declared.get("models"):
            return {"prompt_million_tokens": None, "completion_million_tokens": None} | declared
        return declared

    def answer(self, model: str, prompt_tokens: int, completion_tokens: int) -> float:
        """What one answer of the generator called `model` costs, in US dollars.

        Raises:
            SettingsError: it has no price.
        """
        return self.of(model).answer(prompt_tokens, completion_tokens)

    def of(self, model: str) -> TokenPrice:
        """The price of the generator called `model`.

        Raises:
            SettingsError: it has none. Nothing is free by omission.
        """
        fitting = max((name for name in self.models if model.startswith(name)), key=len, default=None)
        if fitting is not None:
            return self.models[fitting]
        if (price := self._of_all_others) is not None:
            return price
        raise SettingsError(
            f"generator {model!r} has no price: [prices.models] names {', '.join(sorted(self.models))}; add one "
            "that it begins with, or prompt_million_tokens and completion_million_tokens to [prices] for all others"
        )

    @property
    def declared(self) -> tuple[TokenPrice, ...]:
        """Every price that an answer can have."""
        others = self._of_all_others
        return (*self.models.values(), *(() if others is None else (others,)))

    @property
    def _of_all_others(self) -> TokenPrice | None:
        if self.prompt_million_tokens is None or self.completion_million_tokens is None:
            return None
        return TokenPrice(
            prompt_million_tokens=self.prompt_million_tokens, completion_million_tokens=self.completion_million_tokens
        )

    def machine(self, stage: Stage, seconds: float) -> float:
        """What `seconds` of a machine cost in a stage, in US dollars."""
        hour: float = getattr(self, f"{stage}_hour")
        return seconds / 3600 * hour


class Plan(Policy):
    """What `millrace cost plan` counts with beside `Prices`: what the same answers would cost elsewhere, in US
    dollars. Nobody's prices are known here: machines and APIs cost what the declaration says."""

    machine_hour: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of one machine that answers with the own model, whether it is busy or waits."""
    apis: dict[str, TokenPrice] = {}
    """Paid APIs that the own model is compared with, by any name. Their tokens are taken to be as many as ours."""
    tokens_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Prompt and completion tokens together that one busy machine does; empty: measured from the exchanges."""
    utilisation: float = Field(0.7, gt=0, le=1)
    """Share of its time that a machine may be busy at the highest load; the rest keeps answers from queueing."""
    peak_factor: float = Field(2.0, ge=1, allow_inf_nan=False)
    """The highest load that machines must carry, as a multiple of the day's mean."""
    minimum_machines: int = Field(1, ge=1)
    """Rented however low the load is: 2 outlive the loss of one."""
    monthly: dict[Stage, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """How often a month: fine-tunes, evaluations, studies of prompts, refreshes of embeddings, runs over a table of
    questions. A stage that is not named goes on as often as it was recorded."""


Metric = Literal[
    "failed_share",  # of users, by the last exchange that ended
    "unfinished_share",  # of users, by the last exchange: accepted, and no end of it has arrived
    "fell_back_share",  # of a challenger's users: the champion answered the last exchange, because it failed
    "feedback_rate",  # of answers
    "rating_mean",  # over users who rated, 0 to 1
    "seconds_p95",  # of answers that no challenger had to fail for
    "cost_per_exchange",  # US dollars
    "drift",  # columns that differ from the week before
]
Action = Literal["alert", "retrain", "reembed", "rollback"]
ACTS_WITHIN = timedelta(days=1)
"""What is found later than this after its window ended, as by a backfill, is written down; nobody is woken and nothing
is started."""


class Bound(Policy):
    """What a release's metric must not pass. It breaches when its confidence bound, not only its value, is beyond."""

    metric: Metric
    above: float | None = None
    below: float | None = None
    minimum: int = Field(30, ge=2)
    """Observations (exchanges; of ratings and failures, users) in the window below which nothing is said."""
    action: Action = "alert"
    """Beside the alert, which every breach gives."""

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError(f"a bound on {self.metric} needs either `above` or `below`")
        if self.metric == "drift" and self.below is not None:
            raise ValueError("a bound on drift needs `above`: how many drifted columns are still fine")
        return self

    @property
    def told(self) -> str:
        side, value = ("above", self.above) if self.above is not None else ("below", self.below)
        return f"{self.metric} {side} {value:g}"


class Monitor(Policy):
    """What is watched after the rollout, window by window."""

    minutes: int = Field(60, ge=1, le=1440)
    """Length of a window; windows begin at midnight UTC, so it must divide a day."""
    bounds: tuple[Bound, ...] | None = None
    """Replaces the default bounds (`monitoring/bounds.py`)."""
    confidence: float = Field(0.999, gt=0.5, lt=1)
    """Of a bound's one-sided interval: a metric exactly at its bound breaches one window in 1000."""
    quiet_hours: float = Field(24, ge=0)
    """A bound that a release breached so short before starts no second retraining or re-embedding."""
    drift_error_rate: float = Field(0.001, gt=0, lt=0.5)
    """Probability that a window without any drift is called drifted in any column."""
    drift_size: float = Field(0.15, ge=0, lt=1)
    """Smallest distance of two distributions (Kolmogorov-Smirnov) that matters, however certain it is."""
    drift_minimum: int = Field(50, ge=5)
    """Users in the window, and in the reference, below which nothing is said."""
    drift_reference: int = Field(1000, ge=50)
    """Users of the week before that a window is compared with."""

    @model_validator(mode="after")
    def _divides_a_day(self) -> Self:
        if 1440 % self.minutes:
            raise ValueError(f"minutes ({self.minutes}) must divide a day of 1440 minutes")
        return self


class Sample(Policy):
    """What staging takes of prod's rows: each by a hash of its key alone, so that a row is in or out for good, a larger
    share holds the smaller one, and two tables with one key agree."""

    share: float = Field(0.1, gt=0, le=1)
    """Of every stratum that `strata` doesn't name."""
    strata: dict[Annotated[str, Field(pattern=STRATUM)], Annotated[float, Field(ge=0, le=1)]] = {}
    """Stratum → its share. Documents are told apart by `section/<name>`, those without one by `source/<kind>`;
    exchanges and their feedback by `rating/bad` (below 0.5), `rating/good` and `rating/none`."""
    salt: str = "1"
    """Another one takes other rows."""
    phone_regions: tuple[Annotated[str, Field(pattern="^[A-Z]{2}$")], ...] = ("US",)
    """Countries (`US`, `DE`) whose phone numbers are found in free text without a country code, too."""

    def share_of(self, stratum: str) -> float:
        return self.strata.get(stratum, self.share)

    def takes(self, key: str, *strata: str) -> bool:
        """Whether the row with this key is in the sample, if it is of one of these strata."""
        digest = hashlib.sha256(f"{len(self.salt)}:{self.salt}{key}".encode()).digest()
        return int.from_bytes(digest[:8]) < max(self.share_of(stratum) for stratum in strata) * 2**64
