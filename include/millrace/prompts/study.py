"""The study: an Optuna search over prompts on some questions, then one comparison of start and best on others.

The sampler is TPE (Bergstra et al., *Algorithms for Hyper-Parameter Optimization*, NeurIPS 2011), the pruner the
Wilcoxon signed-rank test on the questions that both the trial and the best one answered. What a trial proposes
depends only on its number and on the trials before it, so a study that goes on from its kept trials is the study
that was never interrupted. It is given a way to answer; it knows no release, table or registry.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from millrace.applications import Gate, Optimize
from millrace.errors import PromptError, ReleaseError
from millrace.lakehouse.content import content_hash
from millrace.prompts.development import LEAST
from millrace.prompts.space import Point, Space
from millrace.releases.pipeline import Answer
from millrace.scoring.bootstrap import Interval, mean_difference
from millrace.scoring.overlap import token_f1
from millrace.sources.questions import Question

if TYPE_CHECKING:
    import optuna

AT_ONCE = 8
"""Questions that are answered together: what continuous batching is for. Between these waves a trial may be ended."""
LOSING = 0.1
"""p-value of the signed-rank test below which a trial is ended."""
DRAWS = 3
"""Proposals of the sampler, after which one is drawn from what was not tried: what it likes best, it likes again."""

State = Literal["complete", "pruned", "failed"]
Ask = Callable[[str], Answer]


@dataclass(frozen=True)
class Trial:
    """One point and what it was worth on the questions that it answered."""

    number: int
    point: Point
    state: State
    scores: Mapping[str, float]
    """Question id → token-F1, in the order of asking."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    why: str
    """Why it ended; empty if it answered all."""

    @property
    def tokens(self) -> int:
        """What it takes of the budget."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def mean(self) -> float:
        """Mean token-F1 over what it answered; 0 if that is nothing."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else 0.0


@dataclass(frozen=True)
class Outcome:
    """What a study found."""

    trials: tuple[Trial, ...]
    best: Trial
    """On the questions that were searched with; the start, if nothing scored more."""
    start_held_out: Trial | None
    best_held_out: Trial | None
    """On the held-out questions; None: the best is the start, or it fails there."""
    difference: Interval | None
    """Mean token-F1, best minus start, on the held-out questions."""
    better: bool
    why: str


def search(
    space: Space,
    questions: Sequence[Question],
    optimize: Optimize,
    prepare: Callable[[Point], Ask],
    known: Sequence[Trial],
    keep: Callable[[Trial], None],
) -> list[Trial]:
    """All trials of a study, those that are `known` first; each new one is kept as soon as it ends.

    Args:
        prepare: how a point answers; raises ReleaseError if it can't, and then only that trial fails.
        keep: takes each new trial, so that it is known next time.

    Raises:
        PromptError: every trial failed, the start failed, or the budget doesn't cover the start.
        EngineError, RetrievalError: nothing can be answered at present.
    """
    trials = list(known)
    while len(trials) < optimize.trials:
        if trials:
            _require_room(trials[0], optimize)
        if trials and trials[0].state == "failed" and trials[-1].state != "failed":
            break  # It is not the engine that fails, it is the start, and nothing can be compared with it.
        room = optimize.token_budget - sum(trial.tokens for trial in trials) - _reserved(trials, optimize)
        if trials and room <= 0:
            break
        proposal = _propose(space, optimize, trials)
        if proposal is None:
            break
        point, losing = proposal
        # The start is what everything is compared with: it is never cut short.
        trial = _try(len(trials), point, questions, prepare, room if trials else None, losing)
        keep(trial)
        trials.append(trial)
    _require_answers(trials)
    return trials


def best_of(trials: Sequence[Trial]) -> Trial:
    """The complete trial with the highest mean; of equals the one with fewer tokens, then the earlier."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return max(complete, key=lambda trial: (trial.mean, -trial.tokens, -trial.number))


def compare(
    trials: Sequence[Trial],
    held_out: Sequence[Question],
    prepare: Callable[[Point], Ask],
    gate: Gate,
    known: Mapping[int, Trial],
    keep: Callable[[Trial], None],
    *,
    seed: int,
) -> Outcome:
    """Let the start and the best trial answer the held-out questions, once, and say whether the best is better.

    Args:
        known: trial number → what it said to the held-out questions before.
        keep: takes each answer sheet that is new.

    Raises:
        PromptError: the start can't answer a held-out question.
        EngineError, RetrievalError: nothing can be answered at present.
    """
    start, best = trials[0], best_of(trials)
    tried = tuple(trials)
    if best.mean <= start.mean:
        why = (
            f"none of {len(trials)} trials scored more than the champion's own prompt "
            f"({start.mean:.3f} on {len(start.scores)} questions)"
        )
        return Outcome(tried, start, None, None, None, False, why)
    sheets: list[Trial] = []
    for trial in (start, best):
        sheet = known.get(trial.number)
        if sheet is None:
            sheet = _try(trial.number, trial.point, held_out, prepare, None, None)
            keep(sheet)
        sheets.append(sheet)
    ours, theirs = sheets
    _require_answers([ours])
    if theirs.state != "complete":
        why = f"trial {best.number} ({best.point}) fails on held-out questions: {theirs.why}"
        return Outcome(tried, best, ours, theirs, None, False, why)
    columns = [np.array([sheet.scores[q.question_id] for q in held_out]) for sheet in sheets]
    documents = [question.document_id for question in held_out]
    groups = documents if len(set(documents)) >= LEAST else None
    difference = mean_difference(columns[0], columns[1], gate.confidence, gate.resamples, seed, groups)
    better = difference.low > 0
    told = "which excludes 0" if better else "which does not exclude that it is no better; the champion's prompt stays"
    why = (
        f"trial {best.number} ({best.point}) scored {theirs.mean:.3f} on {len(held_out)} held-out questions, the "
        f"champion's own prompt {ours.mean:.3f}: {difference.estimate:+.3f}, {gate.confidence:.0%} interval "
        f"{difference.low:+.3f} to {difference.high:+.3f}, {told}"
    )
    return Outcome(tried, best, ours, theirs, difference, better, why)


def _propose(space: Space, optimize: Optimize, trials: Sequence[Trial]) -> "tuple[Point, _Losing] | None":
    """A point that was not tried yet, and whether a trial of it is losing. None: all were tried."""
    import optuna

    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(values) for name, values in space.parameters.items()
    }
    tried = {trial.point for trial in trials}
    templates = space.parameters["template"]
    for draw in range(DRAWS + 1):
        study = _study(optimize, trials, distributions, draw, startup=len(templates))
        if not trials:
            study.enqueue_trial(asdict(space.start))
        elif draw == DRAWS:
            left = [point for point in space.points() if point not in tried]
            if not left:
                return None
            study.enqueue_trial(asdict(left[_seed(optimize, trials, draw) % len(left)]))
        elif len(trials) < len(templates):
            # The template decides most: each is tried once, all else as the champion has it; then the sampler chooses.
            others = [name for name in templates if name != space.start.template]
            study.enqueue_trial(asdict(space.start) | {"template": others[len(trials) - 1]})
        asked = study.ask(distributions)
        point = Point(**asked.params)
        if point not in tried:
            return point, _Losing(asked)
    raise AssertionError("the last draw is one that was not tried")


def _seed(optimize: Optimize, trials: Sequence[Trial], draw: int) -> int:
    return int(content_hash(optimize.seed, len(trials), draw), 16) % 2**32


def _study(
    optimize: Optimize,
    trials: Sequence[Trial],
    distributions: "dict[str, optuna.distributions.BaseDistribution]",
    draw: int,
    startup: int,
) -> "optuna.Study":
    """An Optuna study in memory that has seen `trials`."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # or it tells every trial on standard error
    sampler = optuna.samplers.TPESampler(seed=_seed(optimize, trials, draw), n_startup_trials=startup)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=LOSING, n_startup_steps=AT_ONCE)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    best: Trial | None = None
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL if trial.state == "failed" else optuna.trial.TrialState.COMPLETE,
                params=asdict(trial.point),
                distributions=distributions,
                value=None if trial.state == "failed" else _worth(trial, best),
                intermediate_values=dict(enumerate(trial.scores.values())),
            )
        )
        if trial.state == "complete" and (best is None or trial.mean > best.mean):
            best = trial
    return study


def _worth(trial: Trial, best: Trial | None) -> float:
    """What the sampler is told. A trial that was ended early would have scored about as much less than the best as it
    did on the questions that both answered: its own mean may be of the easy ones alone."""
    if trial.state == "complete" or best is None:
        return trial.mean
    common = [question for question in trial.scores if question in best.scores]
    behind = sum(trial.scores[q] - best.scores[q] for q in common) / len(common) if common else 0.0
    return best.mean + min(behind, -1e-9)


class _Losing:
    """Whether a trial that was asked for is so far behind the best one that it may end."""

    def __init__(self, asked: "optuna.Trial") -> None:
        self._asked = asked
        self._reported = 0

    def __call__(self, scores: Sequence[float]) -> bool:
        for step in range(self._reported, len(scores)):
            self._asked.report(scores[step], step)
        self._reported = len(scores)
        return self._asked.should_prune()


def _try(
    number: int,
    point: Point,
    questions: Sequence[Question],
    prepare: Callable[[Point], Ask],
    room: int | None,
    losing: _Losing | None,
) -> Trial:
    """Let `point` answer, wave by wave, until the questions or the room for tokens are used up or it is losing."""
    started = time.perf_counter()
    scores: dict[str, float] = {}
    read = written = 0

    def ended(state: State, why: str = "") -> Trial:
        return Trial(number, point, state, scores, read, written, time.perf_counter() - started, why)

    try:
        ask = prepare(point)
    except ReleaseError as error:
        return ended("failed", str(error))
    with ThreadPoolExecutor(AT_ONCE, "trial") as pool:
        for start in range(0, len(questions), AT_ONCE):
            if start and room is not None and read + written >= room:
                return ended("pruned", f"the token budget ran out after {start} of {len(questions)} questions")
            if start and losing is not None and losing(list(scores.values())):
                return ended("pruned", f"losing to the best trial after {start} of {len(questions)} questions")
            wave = questions[start : start + AT_ONCE]
            futures = [pool.submit(ask, question.question) for question in wave]
            failure = ""
            for question, future in zip(wave, futures, strict=True):
                try:
                    answer = future.result()
                except ReleaseError as error:
                    failure = failure or f"{question.question!r}: {error}"
                    continue
                scores[question.question_id] = token_f1(answer.text, question.answer)
                read += answer.usage.prompt_tokens
                written += answer.usage.completion_tokens
            if failure:
                return ended("failed", failure)
    return ended("complete")


def _reserved(trials: Sequence[Trial], optimize: Optimize) -> int:
    """Tokens that the held-out answers of start and best will take, if the best is as dear as the dearest so far."""
    means = [trial.tokens / len(trial.scores) for trial in trials if trial.scores]
    return round(optimize.held_out * (means[0] + max(means))) if means else 0


def _require_room(start: Trial, optimize: Optimize) -> None:
    needed = start.tokens + _reserved([start], optimize)
    if needed >= optimize.token_budget:
        raise PromptError(
            f"a budget of {optimize.token_budget} tokens is too small: the champion's own prompt took {start.tokens} "
            f"for {len(start.scores)} questions, and start and held-out answers together take about {needed}; "
            "raise token_budget, or ask fewer questions"
        )


def _require_answers(trials: Sequence[Trial]) -> None:
    start = trials[0]
    if all(trial.state == "failed" for trial in trials) and len(trials) > 1:
        raise PromptError(f"all {len(trials)} trials failed, so no prompt is registered; the first: {start.why}")
    if start.state == "failed":
        raise PromptError(f"the champion's own prompt fails, so nothing can be compared with it: {start.why}")
