"""The gate: may this candidate meet users? Paired against the champion on one frozen set, once, and written down.

It compares (`comparison.py`) what both releases answered (`answers.py`), and what their generators know beside the
documents (`general.py`), after making sure that nobody trained on the questions. It does not decide who gets the
candidate: the rollout does, with what is written here.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import GateRefusal, MillraceError
from millrace.evaluation.answers import Arm, Scored, answer_both, as_scores
from millrace.evaluation.comparison import Criterion, compare
from millrace.evaluation.general import GeneralAnswer, ask_general, general_questions, general_set_id
from millrace.evaluation.sets import Example, freeze_evaluation_set, read_evaluation_set
from millrace.evaluation.tracking import log_evaluation
from millrace.lakehouse.audit.journals import follow
from millrace.lakehouse.costs import Cost, cost_id, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_EVALUATIONS
from millrace.lakehouse.trained import all_trained_sets, trained_questions
from millrace.releases.loader import ReleaseLoader
from millrace.releases.manifest import Manifest
from millrace.releases.published_split import read_split
from millrace.releases.registry import release_manifest, versions
from millrace.retrieval.index import published_build
from millrace.scoring.duplicates import near_duplicates
from millrace.settings import Settings

SHOWN = 3
"""Examples that a refusal names."""


@dataclass(frozen=True)
class Side:
    """One of the two releases, before it is loaded."""

    version: str
    manifest: Manifest
    build: str


def evaluate_candidate(
    settings: Settings,
    application: Application,
    *,
    run: str,
    candidate: str | None = None,
    evaluation_set: str | None = None,
) -> dict[str, Any]:
    """Evaluate a candidate against the champion, or find that it was done.

    Args:
        candidate: release version; None: the newest version after the champion that was not yet evaluated
            against it.
        evaluation_set: a frozen set's id; None: the one that the current documents give.

    Returns:
        `verdict` (`passed`, `refused`, `nothing`: there is nobody to compare), `why`, `changed`; unless nothing:
        `evaluation_id`, `evaluation_set`, `champion`, `candidate`, `index_build`, `criteria` (dicts of
        `Criterion`), `worst` (the examples that lost most).

    Raises:
        MillraceError: no evaluation questions, no index build, no such version, or the champion can't answer.
    """
    lake = Lake.of(settings, application.name)
    split = read_split(settings, application.name)
    if split is None or split.champion is None:
        return _nothing("there is no champion to compare with")
    registered = versions(settings, application)
    candidate = candidate or newest_unevaluated(lake, split.champion, list(registered))
    if candidate is None:
        return _nothing(f"no version after champion {split.champion} waits for an evaluation")
    if candidate not in registered:
        raise MillraceError(
            f"{application.name} has no release version {candidate!r}; registered are {', '.join(registered) or 'none'}"
        )
    if candidate == split.champion:
        return _nothing(f"version {candidate} is the champion")
    set_id = evaluation_set or freeze_evaluation_set(settings, application, run=run)
    sides = [_side(settings, application, version) for version in (split.champion, candidate)]
    evaluation_id = identify(set_id, sides[0], sides[1], application)
    known = _read(lake, evaluation_id)
    changed = known is None
    if known is None:
        training_sets = all_trained_sets(registered[candidate])
        examples = read_evaluation_set(lake, set_id)
        started = time.perf_counter()
        criteria, scored, general = _evaluate(settings, application, sides, examples, training_sets, evaluation_id)
        seconds = time.perf_counter() - started
        record_cost(lake, _cost(application, evaluation_id, sides[1], scored, general, seconds), run=run)
        known = _write(lake, evaluation_id, set_id, sides, criteria, scored, run)
    # Also when nothing is new: a run that was killed after its write has not logged.
    follow(settings, application.name, run=run)
    log_evaluation(settings, application.name, known)
    return known | {"changed": changed}


def require_passed(result: dict[str, Any]) -> None:
    """Raises:
    GateRefusal: the candidate did not pass; the message says which criterion, by how much, on which examples.
    """
    if result["verdict"] != "refused":
        return
    failed = "; ".join(criterion["why"] for criterion in result["criteria"] if not criterion["passed"])
    raise GateRefusal(
        f"version {result['candidate']} was refused against champion {result['champion']}: {failed}. "
        f"Worst examples: {'; '.join(_told(example) for example in result['worst'])}. "
        f"All of them: evaluation {result['evaluation_id']} in ops/evaluations"
    )


def waiting_candidate(settings: Settings, application: Application) -> str | None:
    """Whom `evaluate_candidate` takes if nobody is named."""
    split = read_split(settings, application.name)
    if split is None or split.champion is None:
        return None
    return newest_unevaluated(
        Lake.of(settings, application.name), split.champion, list(versions(settings, application))
    )


def newest_unevaluated(lake: Lake, champion: str, registered: Sequence[str]) -> str | None:
    """The newest registered version after the champion that no evaluation against it names.

    Older versions are not candidates by themselves: a former champion would come back on its own. By name they
    can be evaluated like any other.
    """
    rows = lake.read(OPS_EVALUATIONS, ["candidate"], where=pc.field("champion") == champion)
    evaluated = set(rows["candidate"].to_pylist())
    waiting = [v for v in registered if int(v) > int(champion) and v not in evaluated]
    return max(waiting, key=int, default=None)


def identify(set_id: str, champion: Side, candidate: Side, application: Application) -> str:
    """The id of an evaluation: the same question to the gate is the same evaluation, however often it is asked."""
    asked = [
        set_id,
        champion.manifest.release_id,
        candidate.manifest.release_id,
        _builds(champion, candidate),
        general_set_id(general_questions()),
        application.gate.model_dump(mode="json"),
        application.prices.model_dump(mode="json"),
    ]
    return f"eval-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"


def find_leaks(lake: Lake, training_set: str, examples: Sequence[Example]) -> list[tuple[str, Example]]:
    """Training questions that are nearly an evaluation question, each with it.

    Raises:
        MillraceError: the training set isn't there, so nobody can say what the candidate was trained on.
    """
    trained = trained_questions(lake, training_set)
    if not trained:
        raise MillraceError(
            f"training set {training_set} is not in gold/training_examples nor gold/preference_examples, so it can't "
            "be checked against the evaluation set; build it again with the run that the release's tag names"
        )
    found = near_duplicates(trained, [example.question for example in examples])
    return [(trained[position], examples[other]) for position, other in sorted(found.items())]


def _evaluate(
    settings: Settings,
    application: Application,
    sides: list[Side],
    examples: list[Example],
    training_sets: Sequence[str],
    evaluation_id: str,
) -> tuple[list[Criterion], list[dict[str, Any]], list[GeneralAnswer]]:
    """Criteria; the examples with both scores, worst first; and both releases' answers to general questions. A leak is
    refused before anything is loaded."""
    lake = Lake.of(settings, application.name)
    leaks = [leak for training_set in training_sets for leak in find_leaks(lake, training_set, examples)]
    leak = _leak_criterion(leaks, training_sets)
    if leaks:
        return [leak], [asdict(example) | {"trained_on": question} for question, example in leaks], []
    seed = int(evaluation_id[-8:], 16)
    loader = ReleaseLoader(settings, application)
    try:
        arms = [
            Arm(name, loader.load(side.version), side.build)
            for name, side in zip(("champion", "candidate"), sides, strict=True)
        ]
        champion, candidate = answer_both(arms[0], arms[1], examples, application.prices)
        general, answers = ask_general(
            arms[0], arms[1], general_questions(), application.prices, application.gate, seed=seed
        )
    finally:
        loader.close()
    documents = [example.document_id for example in examples]
    quality, retrieval, *budgets = compare(
        as_scores(champion), as_scores(candidate), application.gate, seed=seed, documents=documents
    )
    return [leak, quality, retrieval, general, *budgets], _worst_first(examples, champion, candidate), answers


def _cost(
    application: Application,
    evaluation_id: str,
    candidate: Side,
    scored: list[dict[str, Any]],
    general: list[GeneralAnswer],
    seconds: float,
) -> Cost:
    """What an evaluation cost: both releases' answers, and the machine. It is the candidate's."""
    answers = [row[arm] for row in scored for arm in ("champion", "candidate") if arm in row]
    answers += [asdict(answer) for answer in general]
    return Cost(
        cost_id("evaluation", evaluation_id, uuid.uuid4().hex),
        "evaluation",
        evaluation_id,
        seconds=seconds,
        tokens=sum(answer["tokens"] for answer in answers),
        cost_usd=sum(answer["cost"] for answer in answers) + application.prices.machine("evaluation", seconds),
        release_id=candidate.manifest.release_id,
    )


def _leak_criterion(leaks: list[tuple[str, Example]], training_sets: Sequence[str]) -> Criterion:
    count = float(len(leaks))
    named = f"training set {', '.join(training_sets)}"
    if not training_sets:
        why = "the candidate was not trained here"
    elif leaks:
        why = f"{len(leaks)} questions of {named} are, or nearly are, evaluation questions"
    else:
        why = f"no question of {named} is nearly an evaluation question"
    return Criterion("leak", "count", None, count, count, count, count, 0.0, not leaks, why)


def _worst_first(examples: list[Example], champion: list[Scored], candidate: list[Scored]) -> list[dict[str, Any]]:
    rows = [
        asdict(example) | {"champion": asdict(ours), "candidate": asdict(theirs)}
        for example, ours, theirs in zip(examples, champion, candidate, strict=True)
    ]
    return sorted(rows, key=lambda row: row["candidate"]["quality"] - row["champion"]["quality"])


def _side(settings: Settings, application: Application, version: str) -> Side:
    manifest = release_manifest(settings, application, version)
    return Side(version, manifest, published_build(settings, application, manifest.retrieval.lineage))


def _builds(champion: Side, candidate: Side) -> str:
    return champion.build if champion.build == candidate.build else f"{champion.build}+{candidate.build}"


def _write(
    lake: Lake,
    evaluation_id: str,
    set_id: str,
    sides: list[Side],
    criteria: list[Criterion],
    scored: list[dict[str, Any]],
    run: str,
) -> dict[str, Any]:
    champion, candidate = sides
    row = {
        "evaluation_id": evaluation_id,
        "evaluation_set": set_id,
        "champion": champion.version,
        "candidate": candidate.version,
        "champion_release_id": champion.manifest.release_id,
        "candidate_release_id": candidate.manifest.release_id,
        "index_build": _builds(champion, candidate),
        "passed": all(criterion.passed for criterion in criteria),
        "criteria": json.dumps([asdict(criterion) for criterion in criteria]),
        "examples": json.dumps(scored, ensure_ascii=False),
        "evaluated_at": datetime.now(UTC),
    }
    lake.merge(OPS_EVALUATIONS, pa.Table.from_pylist([row], schema=OPS_EVALUATIONS.rows_schema), run=run)
    return _result(row)


def _read(lake: Lake, evaluation_id: str) -> dict[str, Any] | None:
    rows = lake.read(OPS_EVALUATIONS, where=pc.field("evaluation_id") == evaluation_id).to_pylist()
    return _result(rows[0]) if rows else None


def _result(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ops/evaluations as `evaluate_candidate` returns it."""
    criteria = json.loads(row["criteria"])
    names = ("evaluation_id", "evaluation_set", "champion", "candidate", "index_build")
    return {name: row[name] for name in names} | {
        "verdict": "passed" if row["passed"] else "refused",
        "why": "; ".join(c["why"] for c in criteria if c["passed"] == row["passed"]),
        "criteria": criteria,
        "worst": json.loads(row["examples"])[:SHOWN],
    }


def _nothing(why: str) -> dict[str, Any]:
    return {"verdict": "nothing", "why": why, "changed": False}


def _told(example: dict[str, Any]) -> str:
    """One example of a refusal, in a few words."""
    if "trained_on" in example:
        return f"{example['question']!r} (trained on {example['trained_on']!r})"
    ours, theirs = example["champion"], example["candidate"]
    said = theirs["error"] or _short(theirs["answer"])
    return (
        f"{example['question']!r} ({ours['quality']:.2f} → {theirs['quality']:.2f}, {theirs['seconds']:.1f} s: "
        f"{said!r}; known answer {_short(example['answer'])!r})"
    )


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:119]}…"
