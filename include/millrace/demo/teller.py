"""How a stage of the story is told: DAG runs started and followed, users let in, and what must be there looked for.

It knows Airflow's runs, the tables and the split; which stages there are, and what each must leave behind, is
`story.py`'s business.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import httpx
import pyarrow as pa
import pyarrow.compute as pc

from millrace.airflow_api import Airflow, Run
from millrace.applications import Application
from millrace.demo.progress import Progress, Stage
from millrace.demo.users import SimulatedUsers, Traffic
from millrace.errors import MillraceError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_EVALUATIONS, SILVER_DOCUMENTS, SILVER_EXCHANGES
from millrace.releases.published_split import read_split
from millrace.releases.split import Split
from millrace.retrieval.builds import current
from millrace.retrieval.index import declared_builds
from millrace.rollout.decisions import fold, read_journal
from millrace.settings import Settings
from millrace.sources.questions import Question, derive_questions

DAG_MINUTES = 30
ASSET_SECONDS = 120
"""A run that an asset should have started is missed after this long."""


class StoryError(MillraceError):
    """A stage ended without what it should have left behind."""


@dataclass(frozen=True)
class Verdict:
    """What the gate said of a candidate."""

    word: Literal["passed", "refused", "is champion already"]
    failed: tuple[str, ...] = ()
    """Names of the criteria that it did not meet."""
    quality_lost: float | None = None
    """Mean token-F1 of the champion minus the candidate's; None where a leak was refused before either answered."""

    def __str__(self) -> str:
        return f"{self.word} ({', '.join(self.failed)})" if self.failed else self.word


@dataclass
class Teller:
    """One application on a running stack, and the display."""

    settings: Settings
    application: Application
    airflow: Airflow
    progress: Progress
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        self.lake = Lake.of(self.settings, self.application.name)
        self.asked: list[str] = []
        self.crowd = self.started.strftime("%Y%m%dT%H%M%S")

    def traffic_until_decided(self, stage: Stage, candidate: str) -> str:
        """Let simulated users come until the journal ends the candidate's rollout; the kind of that decision."""
        after = len(read_journal(self.lake))
        users = self.users("live", f"{self.crowd}-{candidate}", corrections=False)
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

            until(decided, self.application.demo.rollout_minutes * 60, f"the rollout of {candidate} is undecided")
        self.asked += [visit.completion_id for visit in traffic.visits]
        until(lambda: self.settled(candidate), 60, "the published split does not follow the journal")
        return end

    def counted(self, stage: Stage) -> bool:
        """Whether every exchange of the rollouts is in the Lakehouse, so that the report can count who met what."""
        asked = pc.field("completion_id").isin(pa.array(self.asked, pa.string()))
        there = self.lake.read(SILVER_EXCHANGES, ["completion_id"], where=asked).num_rows
        told, all_there = stage.detail.split("; counting")[0], there == len(self.asked)
        self.progress.say(stage, told if all_there else f"{told}; counting exchanges: {there} of {len(self.asked)}")
        return all_there

    def ended(self, version: str) -> bool:
        """Whether a rollout of it has ended (none starts again by itself): one that runs has not."""
        state = fold(read_journal(self.lake))
        return version in state.decided and version != state.challenger

    def settled(self, candidate: str) -> bool:
        split = self.split_now()
        return split is not None and split.challenger != candidate

    def evaluate(self, stage: Stage, candidate: str) -> Verdict:
        """The gate's word; evaluates unless that was done against this champion."""
        champion = self.champion_now()
        if candidate == champion:
            return Verdict("is champion already")
        # A new version's asset has started a run, or will: what it leaves unevaluated is asked for by name.
        for run in self.airflow.runs(self.dag("evaluate_candidate"), since=self.started, run_type="asset_triggered"):
            self.follow(stage, run, may_fail=True)
        if self.verdict(candidate, champion) is None:
            self.run_dag(stage, "evaluate_candidate", {"candidate": candidate}, may_fail=True)
        verdict = self.verdict(candidate, champion)
        if verdict is None:
            raise StoryError(f"version {candidate} was not evaluated against version {champion}")
        return verdict

    def verdict(self, candidate: str, champion: str) -> Verdict | None:
        rows = self.lake.read(
            OPS_EVALUATIONS,
            ["passed", "criteria", "evaluated_at"],
            where=(pc.field("candidate") == candidate) & (pc.field("champion") == champion),
        ).sort_by("evaluated_at")
        if not rows.num_rows:
            return None
        criteria = json.loads(rows["criteria"][-1].as_py())
        return Verdict(
            "passed" if rows["passed"][-1].as_py() else "refused",
            tuple(one["name"] for one in criteria if not one["passed"]),
            next((-one["estimate"] for one in criteria if one["name"] == "quality"), None),
        )

    def users(self, split: str, crowd: str, *, corrections: bool) -> SimulatedUsers:
        return SimulatedUsers(
            self.settings.gateway_urls,
            self.application.name,
            self.questions(split),
            self.application.demo,
            crowd=crowd,
            corrections=corrections,
            api_key=self.settings.api_key.get_secret_value(),
        )

    def questions(self, split: str) -> list[Question]:
        questions = derive_questions(self.lake.read(SILVER_DOCUMENTS), self.application)
        found = [question for question in questions if question.split == split]
        require(bool(found), f"the documents give no {split} question")
        return found

    def ready(self) -> bool:
        """Whether every gateway has this application's champion; others may not have begun."""
        try:
            told = [httpx.get(f"{url}/readyz", timeout=5, trust_env=False).json() for url in self.settings.gateway_urls]
        except httpx.HTTPError:
            return False
        return all(one["applications"].get(self.application.name) == "ready" for one in told)

    def stage_called(self, name: str) -> Stage:
        return next(stage for stage in self.progress.stages if stage.name == name)

    def build_now(self) -> str | None:
        return current(declared_builds(self.settings, self.application))

    def split_now(self) -> Split | None:
        return read_split(self.settings, self.application.name)

    def champion_now(self) -> str:
        split = self.split_now()
        require(split is not None and split.champion is not None, "there is no champion")
        return str(split.champion) if split else ""

    def dag(self, stage: str) -> str:
        return f"{self.application.name}.{stage}"

    def run_dag(
        self,
        stage: Stage,
        dag: str,
        params: dict[str, Any] | None = None,
        *,
        logical_date: datetime | None = None,
        data_interval: tuple[datetime, datetime] | None = None,
        may_fail: bool = False,
    ) -> Run:
        run = self.airflow.trigger(self.dag(dag), params or {}, logical_date=logical_date, data_interval=data_interval)
        return self.follow(stage, run, may_fail=may_fail)

    def await_asset_run(self, stage: Stage, dag: str) -> Run:
        self.progress.say(stage, f"waiting for the asset to start {self.dag(dag)}")
        run = self.airflow.wait_for_asset_run(self.dag(dag), since=self.started, timeout=ASSET_SECONDS)
        return self.follow(stage, run)

    def follow(self, stage: Stage, run: Run, *, may_fail: bool = False) -> Run:
        def show(tasks: str) -> None:
            self.progress.say(stage, f"{run.dag_id}: {tasks}")

        ended = self.airflow.wait_for_run(run.dag_id, run.run_id, timeout=DAG_MINUTES * 60, on_change=show)
        require(
            may_fail or ended.state == "success",
            f"{run.dag_id} ended as {ended.state}: see {self.settings.airflow_url}/dags/{run.dag_id}/runs/{run.run_id}",
        )
        return ended


def until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise StoryError(f"{otherwise} (waited {seconds:.0f} s)")
        time.sleep(1)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise StoryError(otherwise)
