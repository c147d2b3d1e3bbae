"""One turn of the loop as it would lie in the Lakehouse: real tables, real judgements, users from a generator."""

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from millrace.applications import Application
from millrace.demo.progress import Stage
from millrace.evaluation.comparison import Criterion, Scores, compare, compare_general
from millrace.lakehouse.costs import Cost, cost_id, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_ANSWERS, OPS_EVALUATIONS, SILVER_EXCHANGES
from millrace.monitoring.drift import measure_drift
from millrace.monitoring.metrics import measure
from millrace.monitoring.watch import check
from millrace.policies import Bound, Monitor
from millrace.prompts.space import Point
from millrace.prompts.study import Trial
from millrace.prompts.trials import keep_trial
from millrace.rollout.decisions import Decision, append, decide, fold, read_journal
from millrace.rollout.evidence import Evidence, Exposed
from millrace.rollout.judgement import judge
from millrace.settings import Settings

STARTED = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
STAGES = [
    Stage("documents", "done", "399 documents, 1042 chunks", started=0.0, ended=14.2),
    Stage("index", "done", "build 4f1c9a (1042 vectors)", started=0.0, ended=41.0),
    Stage("champion", "done", "version 1 answers everybody", started=0.0, ended=22.3),
    Stage("gateway", "done", "http://127.0.0.1:8000/v1 answers as 'qa'", started=0.0, ended=6.1),
    Stage("users ask", "done", "60 simulated users asked, 54 rated, mean 0.31", started=0.0, ended=48.9),
    Stage("feedback", "done", "54 of 54 ratings in silver/feedback", started=0.0, ended=63.0),
    Stage("fine-tune", "done", "candidate version 2", started=0.0, ended=512.4),
    Stage("gate", "done", "version 2 passed", started=0.0, ended=146.7),
    Stage("rollout", "done", "version 2: promote at 100%", started=0.0, ended=301.0),
    Stage("regression", "done", "version 3: rolled back", started=0.0, ended=287.5),
    Stage("batch", "done", "version 2 answered 20 questions on Spark, each once", started=0.0, ended=61.0),
    Stage("prompts", "nothing new", "3 trials: the champion's prompt stays", started=0.0, ended=95.2),
    Stage("monitor", "done", "700 exchanges in 4 windows, 1 breaches of the policy", started=0.0, ended=28.4),
    Stage("upkeep", "done", "20 tables: 90 files became 31; the past stays readable", started=0.0, ended=44.9),
]
MEANS = {"1": 0.35, "2": 0.66, "3": 0.04}
"""Version → mean rating and mean token-F1."""


class Turn:
    """Writes what a run would have written; time is its own."""

    def __init__(self, lake: Lake, application: Application) -> None:
        self.lake, self.application = lake, application
        self.now = STARTED
        self.chance = np.random.default_rng(4)
        self.exchanges: list[dict[str, Any]] = []

    def tell(self) -> None:
        """Bootstrap, a good candidate that is promoted, a broken one that is let past the gate and goes back."""
        self.decide("bootstrap", "the first registered release", champion="1")
        self.visits(60, 48, None)
        self.evaluate("1", "2")
        self.now += timedelta(minutes=10)
        self.roll_out("2", "passed the gate against version 1")
        self.evaluate("2", "3")
        self.decide(
            "admit",
            "injected regression, let past the gate on purpose",
            actor="demo",
            challenger="3",
            rollout_id=None,
            epoch=None,
            share=0.0,
            simulated=True,
        )
        self.roll_out("3", "admitted by a person")
        self.write_exchanges()

    def week(self, settings: Settings) -> None:
        """What a week brings beside: a fine-tune's cost, a batch, a study, the monitor."""
        release = _release("2")
        training = Cost(cost_id("training", "tune"), "training", "tune", 512.4, 90_000, 0.01, release)
        record_cost(self.lake, training, run="test")
        answers = [
            {
                **{"question_id": f"q{i}", "release_id": release, "release_version": "2", "index_build": "4f1c9a20"},
                **{"question": "?", "answer": "!", "citations": [], "finish_reason": "stop", "error": None},
                **{"prompt_tokens": 300, "completion_tokens": 9, "seconds": 0.5, "cost_usd": 1e-5, "mode": "batch"},
            }
            for i in range(20)
        ]
        self.lake.merge(GOLD_ANSWERS, pa.Table.from_pylist(answers, schema=GOLD_ANSWERS.rows_schema), run="test")
        about = {"champion_release_id": release, "index_build": "4f1c9a20"}
        for part, questions, means in (("search", 16, (0.6, 0.7, 0.3)), ("held_out", 20, (0.6, 0.62))):
            for number, mean in enumerate(means):
                scores = np.clip(self.chance.normal(mean, 0.2, questions), 0, 1)
                trial = Trial(
                    number,
                    Point("its own" if not number else f"template {number}", 1 + number % 2, 0, 48, 0.0),
                    "pruned" if mean < 0.5 else "complete",
                    {f"{part}-{i}": float(score) for i, score in enumerate(scores)},
                    *(300 * questions, 9 * questions, 20.0),
                    why="losing to the best trial after 8 of 16 questions" if mean < 0.5 else "",
                )
                keep_trial(self.lake, "study-1", part, trial, template="{{ question }}", about=about, run="test")
        ended = self.now + timedelta(minutes=10)
        strict = Monitor(minutes=5, bounds=(Bound(metric="seconds_p95", above=0.9),))
        watched = self.application.model_copy(update={"monitor": strict})
        measured = measure(settings, watched, STARTED, ended, run="test")
        measure_drift(settings, watched, measured, run="test", now=ended)
        check(settings, watched, measured, run="test", now=ended, answering=lambda *_: ())

    def decide(self, kind: Any, reason: str, *, actor: str = "controller", **fields: Any) -> Decision:
        decision = decide(fold(read_journal(self.lake)), kind, actor=actor, reason=reason, **fields)
        decision = decision.model_copy(update={"decided_at": self.now})
        append(self.lake, decision, run="test")
        return decision

    def roll_out(self, challenger: str, reason: str) -> str:
        """Ticks until the real judgement ends it; the kind of its last decision."""
        policy = self.application.rollout
        rollout_id = f"rollout-{challenger}"
        self.decide("start", reason, rollout_id=rollout_id, epoch=1, challenger=challenger, share=policy.steps[0].share)
        users: list[tuple[int, float, bool, float]] = []
        while True:
            state = fold(read_journal(self.lake))
            step = policy.steps[state.epoch - 1]
            users += self.visits(18, 25, rollout_id, state.epoch, step.share, challenger)
            self.now += timedelta(seconds=5)
            evidence = _evidence(users)
            found = judge(evidence, step, state.epoch, policy)
            about = {"evidence": found.summary, "simulated": True}
            if found.kind == "advance" and state.epoch < len(policy.steps):
                self.decide(
                    "advance", found.reason, share=policy.steps[state.epoch].share, epoch=state.epoch + 1, **about
                )
            elif found.kind == "advance":
                self.decide("promote", found.reason, champion=challenger, share=1.0, **about)
                return "promote"
            elif found.kind == "rollback":
                self.decide("rollback", found.reason, share=0.0, **about)
                return "rollback"
            else:
                self.decide(found.kind, found.reason, **about)

    def visits(
        self,
        count: int,
        seconds: float,
        rollout_id: str | None,
        epoch: int = 0,
        share: float = 0.0,
        challenger: str = "",
    ) -> list[tuple[int, float, bool, float]]:
        """New users, one exchange each: (epoch, probability, in the challenger, rating or NaN)."""
        champion = fold(read_journal(self.lake)).champion or ""
        users = []
        for _ in range(count):
            challenged = bool(self.chance.random() < share)
            version = challenger if challenged else champion
            self.now += timedelta(seconds=seconds / count)
            rating = float(np.clip(self.chance.normal(MEANS[version], 0.2), 0, 1))
            users.append((epoch, share, challenged, rating if self.chance.random() < 0.9 else float("nan")))
            self.exchanges.append(self._exchange(version, rollout_id, epoch, challenged, share))
        return users

    def write_exchanges(self) -> None:
        self.lake.merge(
            SILVER_EXCHANGES, pa.Table.from_pylist(self.exchanges, schema=SILVER_EXCHANGES.rows_schema), run="test"
        )

    def evaluate(self, champion: str, candidate: str, examples: int = 60) -> bool:
        hard = self.chance.normal(0, 0.15, examples)
        arms = [
            Scores(
                np.clip(MEANS[version] + hard + self.chance.normal(0, 0.1, examples), 0, 1),
                (np.arange(examples) % 10 != 0) * 1.0,
                self.chance.gamma(9, 0.12, examples),
                self.chance.gamma(9, 1.4e-6, examples),
            )
            for version in (champion, candidate)
        ]
        leak = Criterion(
            "leak", "count", None, 0, 0, 0, 0, 0, True, "no question of training set t1 is nearly one here"
        )
        known = np.arange(60) % 2 * 1.0
        general = compare_general(known, known, self.application.gate, seed=0)
        quality, retrieval, *budgets = compare(*arms, self.application.gate, seed=0)
        criteria = [leak, quality, retrieval, general, *budgets]
        rows = [
            {
                "example_id": f"example-{i}",
                "section": "core",
                "question": f"What is the default of [core] option_{i}?",
                "answer": "32",
                "document_id": f"document-{i}",
                "champion": _scored(arms[0], i, "The default is 32."),
                "candidate": _scored(arms[1], i, "<b>What</b> is the default?" if candidate == "3" else "32"),
            }
            for i in range(examples)
        ]
        passed = all(criterion.passed for criterion in criteria)
        row = {
            "evaluation_id": f"eval-{champion}-{candidate}",
            "evaluation_set": "set-8a41c0de8a41c0de",
            "champion": champion,
            "candidate": candidate,
            "candidate_release_id": _release(candidate),
            "champion_release_id": _release(champion),
            "index_build": "4f1c9a20",
            "passed": passed,
            "criteria": json.dumps([asdict(criterion) for criterion in criteria]),
            "examples": json.dumps(sorted(rows, key=lambda r: r["candidate"]["quality"] - r["champion"]["quality"])),
            "evaluated_at": self.now,
        }
        self.lake.merge(OPS_EVALUATIONS, pa.Table.from_pylist([row], schema=OPS_EVALUATIONS.rows_schema), run="test")
        return passed

    def _exchange(
        self, version: str, rollout_id: str | None, epoch: int, challenged: bool, share: float
    ) -> dict[str, Any]:
        number = len(self.exchanges)
        prompt, completion = int(self.chance.integers(250, 420)), int(self.chance.integers(4, 40))
        return {
            "completion_id": f"completion-{number}",
            "content_hash": f"{number}",
            "events_seen": 2,
            "state": "completed",
            "occurred_at": self.now,
            "completed_at": self.now + timedelta(seconds=1),
            "date": self.now.date(),
            "user": f"pseudonym-{number}",
            "simulated": True,
            "question": "?",
            "answer": "!",
            "release_id": _release(version),
            "release_version": version,
            "index_build": "4f1c9a20",
            "prompt_version": "1",
            "rollout_id": rollout_id,
            "epoch": epoch if rollout_id else None,
            "arm": ("challenger" if challenged else "champion") if rollout_id else None,
            "assignment_probability": share if rollout_id else None,
            "pinned": False,
            "fell_back": False,
            "from_cache": False,
            "citations": [],
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "seconds": 1.0,
            "cost_usd": self.application.prices.answer("a model", prompt, completion),
            "error": None,
        }


def _evidence(users: list[tuple[int, float, bool, float]]) -> Evidence:
    epoch, probability, challenger, rating = (np.array(column) for column in zip(*users, strict=True))
    exposed = tuple(
        Exposed(
            int(e),
            float(probability[epoch == e][0]),
            *(int(np.sum((epoch == e) & (challenger == c))) for c in (False, True)),
        )
        for e in np.unique(epoch)
    )
    ones = np.ones(len(users))
    return Evidence(epoch, challenger, probability, rating, ones, ones, exposed, simulated=True, as_of=None)


def _scored(arm: Scores, i: int, answer: str) -> dict[str, Any]:
    names = ("quality", "retrieval", "seconds", "cost")
    return {"answer": answer, "error": ""} | {name: float(getattr(arm, name)[i]) for name in names}


def _release(version: str) -> str:
    return f"rel-{version * 16}"
