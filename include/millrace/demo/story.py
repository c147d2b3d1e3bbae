"""The story of `make run`: the loop turned once through Airflow, each step verified from what it left behind.

A stage triggers a DAG run, or waits for the one that an asset or a timetable started, and then looks at the
tables, the index, the registry: what isn't there fails the stage, whatever Airflow says. It holds no stage's logic
and takes no decision; where simulated users come in, every row says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import pyarrow.compute as pc

from millrace.airflow_api import Airflow, Run
from millrace.applications import Application
from millrace.demo.progress import Progress, Stage
from millrace.demo.users import SimulatedUsers, Traffic
from millrace.errors import MillraceError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    OPS_EVALUATIONS,
    SILVER_CHUNKS,
    SILVER_DOCUMENTS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
)
from millrace.releases.registry import read_split, versions
from millrace.releases.split import Split
from millrace.retrieval.builds import current
from millrace.retrieval.index import declared_builds
from millrace.rollout import people
from millrace.rollout.decisions import read_journal
from millrace.settings import Settings
from millrace.sources.questions import Question, derive_questions

STAGES = (
    "documents",
    "index",
    "champion",
    "gateway",
    "users ask",
    "feedback",
    "fine-tune",
    "gate",
    "rollout",
    "regression",
)
DAGS = (
    "ingest_documents",
    "refresh_embeddings",
    "declare_release",
    "ingest_feedback",
    "finetune",
    "evaluate_candidate",
    "promote",
    "rollout",
)
ASSET_DRIVEN = ("refresh_embeddings", "evaluate_candidate", "promote")
"""They start by themselves once they are unpaused; the others are unpaused when their turn comes."""
DAG_MINUTES = 30
ASSET_SECONDS = 120
"""A run that an asset should have started is missed after this long."""


class StoryError(MillraceError):
    """A stage ended without what it should have left behind."""


@dataclass
class Story:
    """One turn of the loop for one application on a running stack."""

    settings: Settings
    application: Application
    airflow: Airflow
    progress: Progress
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        self.lake = Lake.of(self.settings, self.application.name)
        self.asked: list[str] = []
        self.crowd = self.started.strftime("%Y%m%dT%H%M%S")

    def tell(self) -> None:
        """All stages in order.

        Raises:
            MillraceError: the first stage that did not do its work.
        """
        self.documents()
        self.index()
        self.champion()
        self.gateway()
        completions = self.users_ask()
        self.feedback(completions)
        candidate = self.finetune()
        passed = self.gate(candidate)
        self.rollout(passed)
        self.regression()

    # ---- documents in

    def documents(self) -> None:
        with self.progress.stage("documents") as stage:
            self.progress.say(stage, "waiting for Airflow to read the DAGs")
            for dag in DAGS:
                self.airflow.wait_for_dag(self._dag(dag))
            for dag in ASSET_DRIVEN:
                self.airflow.unpause(self._dag(dag))
            before = self.lake.version(SILVER_CHUNKS)
            self._run_dag(stage, "ingest_documents")
            documents = self.lake.read(SILVER_DOCUMENTS, ["document_id"]).num_rows
            chunks = self.lake.read(SILVER_CHUNKS, ["chunk_id"]).num_rows
            _require(bool(chunks), "no chunk reached silver/chunks")
            stage.state = "nothing new" if before == self.lake.version(SILVER_CHUNKS) else "running"
            self.progress.say(stage, f"{documents} documents, {chunks} chunks")

    def index(self) -> None:
        with self.progress.stage("index") as stage:
            if self._stage("documents").state == "done":
                self._await_asset_run(stage, "refresh_embeddings")
            elif self._build() is None:
                # An earlier turn ended between the chunks and their index; its asset event may be gone.
                self._run_dag(stage, "refresh_embeddings")
            else:
                stage.state = "nothing new"
            build = self._build()
            _require(build is not None, "no index build was published")
            self.progress.say(stage, f"build {build}")

    # ---- a champion for users to ask

    def champion(self) -> None:
        with self.progress.stage("champion") as stage:
            split = self._split()
            if split and split.champion:
                stage.state = "nothing new"
            else:
                self._run_dag(stage, "declare_release", {"variant": "declared"})
                self._run_dag(stage, "rollout")
                split = self._split()
            _require(split is not None and split.champion is not None, "no champion was published")
            self.progress.say(stage, f"version {split.champion if split else ''} answers everybody")

    def gateway(self) -> None:
        with self.progress.stage("gateway") as stage:
            self.progress.say(stage, "loading the champion")
            _until(self._ready, 180, "the gateway is not ready: see /readyz")
            self.progress.say(stage, f"{self.settings.gateway_url}/v1 answers as {self.application.name!r}")

    def users_ask(self) -> list[str]:
        """The ids of the completions that were rated, each acknowledged by the gateway."""
        with self.progress.stage("users ask") as stage:
            count = self.application.demo.first_questions
            self.progress.say(stage, f"{count} simulated users ask and rate")
            self.airflow.unpause(self._dag("ingest_feedback"))
            visits = self._users("training", f"{self.crowd}-first", corrections=True).visits(count)
            rated = [visit for visit in visits if visit.rating is not None]
            _require(bool(rated), "no simulated user rated an answer")
            mean = sum(visit.rating or 0 for visit in rated) / len(rated)
            self.progress.say(stage, f"{count} simulated users asked, {len(rated)} rated, mean {mean:.2f}")
            return [visit.completion_id for visit in rated]

    def feedback(self, completions: list[str]) -> None:
        with self.progress.stage("feedback") as stage:
            self.progress.say(stage, "waiting for the interval to end and be ingested")
            expected = set(completions)

            def arrived() -> bool:
                ids = self.lake.read(
                    SILVER_FEEDBACK, ["completion_id"], where=pc.field("completion_id").isin(completions)
                )
                counted = ids["completion_id"].to_pylist()
                _require(len(counted) == len(set(counted)), "a feedback was counted twice")
                self.progress.say(stage, f"{len(counted)} of {len(expected)} ratings in silver/feedback")
                return set(counted) == expected

            _until(arrived, 300, "acknowledged feedback did not reach silver/feedback")

    # ---- a better release

    def finetune(self) -> str:
        """The version of the fine-tuned candidate (the same as before if nothing new was learnt)."""
        with self.progress.stage("fine-tune") as stage:
            before = set(versions(self.settings, self.application))
            run = self._run_dag(stage, "finetune")
            candidate = self.airflow.result(self._dag("finetune"), run.run_id, "release")["version"]
            stage.state = "nothing new" if candidate in before else "running"
            self.progress.say(stage, f"candidate version {candidate}")
            return str(candidate)

    def gate(self, candidate: str) -> str | None:
        """The candidate that passed: the fine-tuned one, else a prompt variant, else none."""
        with self.progress.stage("gate") as stage:
            verdicts = []
            for version in self._candidates(stage, candidate):
                verdict = self._evaluate(stage, version)
                verdicts.append(f"version {version} {verdict}")
                self.progress.say(stage, "; ".join(verdicts))
                if verdict != "refused":
                    stage.state = "nothing new" if verdict == "is champion already" else "running"
                    return version if verdict == "passed" else None
            stage.state = "refused"
            return None

    def rollout(self, candidate: str | None) -> None:
        with self.progress.stage("rollout") as stage:
            if candidate is None:
                stage.state = "nothing new"
                self.progress.say(stage, "there is no better candidate to roll out")
                return
            end = self._traffic_until_decided(stage, candidate)
            _require(end != "freeze", f"the rollout of version {candidate} froze: {stage.detail}")
            if end == "rollback":
                stage.state = "refused"
            split = self._split()
            _require(
                split is not None and (split.champion == candidate) == (end in ("promote", "skip")),
                "the published split does not match the journal",
            )

    # ---- a worse one, let past the gate on purpose

    def regression(self) -> None:
        with self.progress.stage("regression") as stage:
            champion = self._champion()
            run = self._run_dag(stage, "declare_release", {"variant": "broken"})
            broken = str(self.airflow.result(self._dag("declare_release"), run.run_id, "declare")["version"])
            verdict = self._evaluate(stage, broken)
            _require(verdict == "refused", f"the gate let the broken release pass ({verdict})")
            people.admit(
                self.settings,
                self.application,
                broken,
                actor="demo",
                reason="injected regression, let past the gate on purpose",
                simulated=True,
            )
            end = self._traffic_until_decided(stage, broken)
            _require(end == "rollback", f"the broken release was not rolled back but ended with {end!r}")
            _require(self._champion() == champion, "the champion changed")
            _until(lambda: self._counted(stage), 300, "acknowledged exchanges did not reach silver/exchanges")

    # ---- shared

    def _traffic_until_decided(self, stage: Stage, candidate: str) -> str:
        """Let simulated users come until the journal ends the candidate's rollout; the kind of that decision."""
        after = len(read_journal(self.lake))
        users = self._users("live", f"{self.crowd}-{candidate}", corrections=False)
        end = ""

        with Traffic(users, self.application.demo.users_per_minute) as traffic:

            def decided() -> bool:
                nonlocal end
                rollout = [d for d in read_journal(self.lake)[after:] if d.challenger == candidate]
                met = sum(visit.release_version == candidate for visit in traffic.visits)
                last = rollout[-1] if rollout else None
                said = f"{last.kind} at {last.share:.0%}" if last else "waiting for the controller"
                self.progress.say(
                    stage, f"version {candidate}: {said} ({met} of {len(traffic.visits)} simulated users met it)"
                )
                ends = [d.kind for d in rollout if d.kind in ("promote", "skip", "rollback", "freeze")]
                end = ends[-1] if ends else ""
                return bool(end)

            _until(decided, self.application.demo.rollout_minutes * 60, f"the rollout of {candidate} is undecided")
        self.asked += [visit.completion_id for visit in traffic.visits]
        _until(lambda: self._settled(candidate), 60, "the published split does not follow the journal")
        return end

    def _counted(self, stage: Stage) -> bool:
        """Whether every exchange of the rollouts is in the Lakehouse, so that the report can count who met what."""
        there = self.lake.read(
            SILVER_EXCHANGES, ["completion_id"], where=pc.field("completion_id").isin(self.asked)
        ).num_rows
        if there < len(self.asked):
            told = stage.detail.split("; counting")[0]
            self.progress.say(stage, f"{told}; counting exchanges: {there} of {len(self.asked)}")
        return there == len(self.asked)

    def _settled(self, candidate: str) -> bool:
        split = self._split()
        return split is not None and split.challenger != candidate

    def _evaluate(self, stage: Stage, candidate: str) -> str:
        """`passed`, `refused` or `is champion already`; evaluates unless that was done against this champion."""
        champion = self._champion()
        if candidate == champion:
            return "is champion already"
        # A new version's asset has started a run, or will: what it leaves unevaluated is asked for by name.
        for run in self.airflow.runs(self._dag("evaluate_candidate"), since=self.started, run_type="asset_triggered"):
            self._follow(stage, run, may_fail=True)
        if self._verdict(candidate, champion) is None:
            self._run_dag(stage, "evaluate_candidate", {"candidate": candidate}, may_fail=True)
        verdict = self._verdict(candidate, champion)
        _require(verdict is not None, f"version {candidate} was not evaluated against version {champion}")
        return "passed" if verdict else "refused"

    def _verdict(self, candidate: str, champion: str) -> bool | None:
        rows = self.lake.read(
            OPS_EVALUATIONS,
            ["passed", "evaluated_at"],
            where=(pc.field("candidate") == candidate) & (pc.field("champion") == champion),
        ).sort_by("evaluated_at")
        return bool(rows["passed"][-1].as_py()) if rows.num_rows else None

    def _candidates(self, stage: Stage, finetuned: str) -> Any:
        yield finetuned
        for variant in self.application.prompt.variants:
            if variant != "broken":
                run = self._run_dag(stage, "declare_release", {"variant": variant})
                yield str(self.airflow.result(self._dag("declare_release"), run.run_id, "declare")["version"])

    def _users(self, split: str, crowd: str, *, corrections: bool) -> SimulatedUsers:
        return SimulatedUsers(
            self.settings.gateway_url,
            self.application.name,
            self._questions(split),
            self.application.demo,
            crowd=crowd,
            corrections=corrections,
        )

    def _questions(self, split: str) -> list[Question]:
        questions = derive_questions(self.lake.read(SILVER_DOCUMENTS), self.application)
        found = [question for question in questions if question.split == split]
        _require(bool(found), f"the documents give no {split} question")
        return found

    def _ready(self) -> bool:
        """Whether the gateway has this application's champion; others may not have begun."""
        try:
            answer = httpx.get(f"{self.settings.gateway_url}/readyz", timeout=5, trust_env=False).json()
        except httpx.HTTPError:
            return False
        return bool(answer["applications"].get(self.application.name) == "ready")

    def _stage(self, name: str) -> Stage:
        return next(stage for stage in self.progress.stages if stage.name == name)

    def _build(self) -> str | None:
        return current(declared_builds(self.settings, self.application))

    def _split(self) -> Split | None:
        return read_split(self.settings, self.application.name)

    def _champion(self) -> str:
        split = self._split()
        _require(split is not None and split.champion is not None, "there is no champion")
        return str(split.champion) if split else ""

    def _dag(self, stage: str) -> str:
        return f"{self.application.name}.{stage}"

    def _run_dag(self, stage: Stage, dag: str, params: dict[str, Any] | None = None, *, may_fail: bool = False) -> Run:
        return self._follow(stage, self.airflow.trigger(self._dag(dag), params or {}), may_fail=may_fail)

    def _await_asset_run(self, stage: Stage, dag: str) -> Run:
        self.progress.say(stage, f"waiting for the asset to start {self._dag(dag)}")
        run = self.airflow.wait_for_asset_run(self._dag(dag), since=self.started, timeout=ASSET_SECONDS)
        return self._follow(stage, run)

    def _follow(self, stage: Stage, run: Run, *, may_fail: bool = False) -> Run:
        def show(tasks: str) -> None:
            self.progress.say(stage, f"{run.dag_id}: {tasks}")

        ended = self.airflow.wait_for_run(run.dag_id, run.run_id, timeout=DAG_MINUTES * 60, on_change=show)
        _require(
            may_fail or ended.state == "success",
            f"{run.dag_id} ended as {ended.state}: see {self.settings.airflow_url}/dags/{run.dag_id}/runs/{run.run_id}",
        )
        return ended


def _until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise StoryError(f"{otherwise} (waited {seconds:.0f} s)")
        time.sleep(1)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise StoryError(otherwise)
