"""Two releases answered the same questions: is the second one good enough? Paired (`scoring/bootstrap.py`), pure.

Questions about one document are found or missed together, so documents are drawn, not questions, unless there are too
few of them. What is not in the examples is not in the interval: where no question lost anything, so few of them may
still hide a loss of 3 in `n` (the rule of three).

Knows scores per example and the policy's margins. Knows nothing of where answers come from, of releases or of
tables (`gate.py` does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from millrace.applications import Gate
from millrace.errors import MillraceError
from millrace.scoring.bootstrap import Floats, mean_difference, ratio_of_means

MINIMUM_EXAMPLES = 5
"""Fewer decide nothing: the interval's small-sample correction doesn't hold either."""


@dataclass(frozen=True)
class Scores:
    """What one release scored, one entry an example, in the same order for both releases."""

    quality: Floats
    """Token-F1 against the known answer, 0 to 1."""
    retrieval: Floats
    """1 where the document that holds the answer was among the chunks of the prompt, else 0."""
    seconds: Floats
    cost: Floats
    """US dollars."""


Documents = Sequence[str] | None
"""Of each example, the document that holds its answer."""


@dataclass(frozen=True)
class Criterion:
    """One thing that the gate asks, and the answer. JSON-able by `dataclasses.asdict`."""

    name: str
    measure: Literal["difference", "ratio", "count"]
    champion: float | None
    """Mean over the examples; None where the question doesn't apply to the champion."""
    candidate: float
    estimate: float
    """Candidate minus champion, or candidate divided by champion, of the means."""
    low: float
    high: float
    bound: float
    """What the interval's near end must reach (difference) or its far end must not exceed (ratio, count)."""
    passed: bool
    why: str


def compare(
    champion: Scores, candidate: Scores, policy: Gate, *, seed: int, documents: Documents = None
) -> list[Criterion]:
    """The gate's criteria, in the order in which people care.

    Args:
        documents: None: each example is of its own.

    Raises:
        MillraceError: too few examples to decide on, or the two releases answered different numbers of them.
    """
    sizes = {len(values) for scores in (champion, candidate) for values in vars(scores).values()}
    if len(sizes) > 1 or min(sizes) < MINIMUM_EXAMPLES:
        raise MillraceError(
            f"a comparison needs the same examples in both arms and at least {MINIMUM_EXAMPLES} of them, got "
            f"{sorted(sizes)}; name more evaluation sections in the application's [questions]"
        )
    of = documents if documents and len(set(documents)) >= MINIMUM_EXAMPLES else None
    seconds, cost = (champion.seconds, candidate.seconds), (champion.cost, candidate.cost)
    return [
        _no_loss("quality", champion.quality, candidate.quality, policy.quality_margin, policy, seed, of),
        _no_loss("retrieval", champion.retrieval, candidate.retrieval, policy.retrieval_margin, policy, seed, of),
        _no_excess("latency", *seconds, policy.latency_ratio, policy, seed, of, "s", 1),
        _no_excess("cost", *cost, policy.cost_ratio, policy, seed, of, "$ a million answers", 1e6),
    ]


def compare_general(champion: Floats, candidate: Floats, policy: Gate, *, seed: int) -> Criterion:
    """Whether the candidate still knows what the champion does, from (n,) scores of the same general questions."""
    subject = "share of general questions answered"
    return _no_loss("general", champion, candidate, policy.general_margin, policy, seed, None, subject)


def _no_loss(
    name: str,
    champion: Floats,
    candidate: Floats,
    margin: float,
    policy: Gate,
    seed: int,
    documents: Documents,
    subject: str = "",
) -> Criterion:
    found = mean_difference(champion, candidate, policy.confidence, policy.resamples, seed, documents)
    passed = found.low >= -margin
    why = (
        f"{subject or name} went from {champion.mean():.3f} to {candidate.mean():.3f}; "
        f"the {policy.confidence:.0%} interval of the difference, {found.low:+.3f} to {found.high:+.3f}, "
        f"{'excludes' if passed else 'does not exclude'} a loss worse than {margin:g}"
    )
    return Criterion(
        name,
        "difference",
        _mean(champion),
        _mean(candidate),
        found.estimate,
        found.low,
        found.high,
        -margin,
        passed,
        why,
    )


def _no_excess(
    name: str,
    champion: Floats,
    candidate: Floats,
    bound: float,
    policy: Gate,
    seed: int,
    documents: Documents,
    unit: str,
    scale: float,
) -> Criterion:
    found = ratio_of_means(champion, candidate, policy.confidence, policy.resamples, seed, documents)
    passed = found.high <= bound
    why = (
        f"{name} went from {champion.mean() * scale:.3g} to {candidate.mean() * scale:.3g} {unit}; the "
        f"{policy.confidence:.0%} interval of the ratio, {found.low:.2f} to {found.high:.2f}, "
        f"{'stays within' if passed else 'reaches beyond'} {bound:g}"
    )
    return Criterion(
        name, "ratio", _mean(champion), _mean(candidate), found.estimate, found.low, found.high, bound, passed, why
    )


def _mean(values: Floats) -> float:
    return float(values.mean())
