"""The story of `make run`: the loop turned once through Airflow, each step verified from what it left behind.

A stage triggers a DAG run, or waits for the one that an asset or a timetable started, and then looks at the
tables, the index, the registry: what isn't there fails the stage, whatever Airflow says. It holds no stage's logic
and takes no decision; where simulated users come in, every row says so.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.compute as pc

from millrace.batch.questions import submit_questions
from millrace.demo.progress import Stage
from millrace.demo.teller import Teller, require, until
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.tables import (
    GOLD_ANSWERS,
    GOLD_METRICS_HOURLY,
    OPS_BREACHES,
    SILVER_CHUNKS,
    SILVER_DOCUMENTS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
)
from millrace.monitoring.windows import touched
from millrace.releases.registry import versions
from millrace.rollout import people

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
    "batch",
    "prompts",
    "monitor",
    "upkeep",
)
DAGS = (
    "ingest_documents",
    "refresh_embeddings",
    "declare_release",
    "ingest_feedback",
    "finetune",
    "evaluate_candidate",
    "approve",
    "rollout",
    "batch_inference",
    "optimize_prompt",
    "monitor",
    "maintain_lakehouse",
)
ASSET_DRIVEN = ("refresh_embeddings", "evaluate_candidate", "approve")
"""They start by themselves once they are unpaused; the others are unpaused when their turn comes."""


class Story(Teller):
    """One turn of the loop for one application on a running stack."""

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
        self.batch()
        self.prompts()
        self.monitor()
        self.upkeep()

    # ---- documents in

    def documents(self) -> None:
        with self.progress.stage("documents") as stage:
            self.progress.say(stage, "waiting for Airflow to read the DAGs")
            for dag in DAGS:
                self.airflow.wait_for_dag(self.dag(dag))
            for dag in ASSET_DRIVEN:
                self.airflow.unpause(self.dag(dag))
            before = self.lake.version(SILVER_CHUNKS)
            self.run_dag(stage, "ingest_documents")
            documents = self.lake.read(SILVER_DOCUMENTS, ["document_id"]).num_rows
            chunks = self.lake.read(SILVER_CHUNKS, ["chunk_id"]).num_rows
            require(bool(chunks), "no chunk reached silver/chunks")
            stage.state = "nothing new" if before == self.lake.version(SILVER_CHUNKS) else "running"
            self.progress.say(stage, f"{documents} documents, {chunks} chunks")

    def index(self) -> None:
        with self.progress.stage("index") as stage:
            if self.stage_called("documents").state == "done":
                self.await_asset_run(stage, "refresh_embeddings")
            elif self.build_now() is None:
                # An earlier turn ended between the chunks and their index; its asset event may be gone.
                self.run_dag(stage, "refresh_embeddings")
            else:
                stage.state = "nothing new"
            build = self.build_now()
            require(build is not None, "no index build was published")
            self.progress.say(stage, f"build {build}")

    # ---- a champion for users to ask

    def champion(self) -> None:
        with self.progress.stage("champion") as stage:
            split = self.split_now()
            if split and split.champion:
                stage.state = "nothing new"
            else:
                self.run_dag(stage, "declare_release", {"variant": "declared"})
                self.run_dag(stage, "rollout")
                split = self.split_now()
            require(split is not None and split.champion is not None, "no champion was published")
            self.progress.say(stage, f"version {split.champion if split else ''} answers everybody")

    def gateway(self) -> None:
        with self.progress.stage("gateway") as stage:
            self.progress.say(stage, "loading the champion")
            until(self.ready, 180, "the gateway is not ready: see /readyz")
            self.progress.say(stage, f"{self.settings.gateway_url}/v1 answers as {self.application.name!r}")

    def users_ask(self) -> list[str]:
        """The ids of the completions that were rated, each acknowledged by the gateway."""
        with self.progress.stage("users ask") as stage:
            count = self.application.demo.first_questions
            self.progress.say(stage, f"{count} simulated users ask and rate")
            self.airflow.unpause(self.dag("ingest_feedback"))
            visits = self.users("training", f"{self.crowd}-first", corrections=True).visits(count)
            rated = [visit for visit in visits if visit.rating is not None]
            require(bool(rated), "no simulated user rated an answer")
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
                require(len(counted) == len(set(counted)), "a feedback was counted twice")
                self.progress.say(stage, f"{len(counted)} of {len(expected)} ratings in silver/feedback")
                return set(counted) == expected

            until(arrived, 300, "acknowledged feedback did not reach silver/feedback")

    # ---- a better release

    def finetune(self) -> str:
        """The version of the fine-tuned candidate (the same as before if nothing new was learnt)."""
        with self.progress.stage("fine-tune") as stage:
            before = set(versions(self.settings, self.application))
            run = self.run_dag(stage, "finetune")
            candidate = self.airflow.result(self.dag("finetune"), run.run_id, "release")["version"]
            stage.state = "nothing new" if candidate in before else "running"
            self.progress.say(stage, f"candidate version {candidate}")
            return str(candidate)

    def gate(self, candidate: str) -> str | None:
        """The candidate that passed: the fine-tuned one, else a prompt variant, else none."""
        with self.progress.stage("gate") as stage:
            verdicts = []
            for version in self._candidates(stage, candidate):
                verdict = self.evaluate(stage, version)
                verdicts.append(f"version {version} {verdict}")
                self.progress.say(stage, "; ".join(verdicts))
                if verdict.word != "refused":
                    stage.state = "nothing new" if verdict.word == "is champion already" else "running"
                    return version if verdict.word == "passed" else None
            stage.state = "refused"
            return None

    def rollout(self, candidate: str | None) -> None:
        with self.progress.stage("rollout") as stage:
            if candidate is None:
                stage.state = "nothing new"
                self.progress.say(stage, "there is no better candidate to roll out")
                return
            if self.ended(candidate):
                stage.state = "nothing new"
                self.progress.say(stage, f"the rollout of version {candidate} has ended before")
                return
            end = self.traffic_until_decided(stage, candidate)
            require(end != "freeze", f"the rollout of version {candidate} froze: {stage.detail}")
            if end == "rollback":
                stage.state = "refused"
            split = self.split_now()
            require(
                split is not None and (split.champion == candidate) == (end in ("promote", "skip")),
                "the published split does not match the journal",
            )

    # ---- a worse one, let past the gate on purpose

    def regression(self) -> None:
        with self.progress.stage("regression") as stage:
            champion = self.champion_now()
            run = self.run_dag(stage, "declare_release", {"variant": "broken"})
            broken = str(self.airflow.result(self.dag("declare_release"), run.run_id, "declare")["version"])
            verdict = self.evaluate(stage, broken)
            require(verdict.word == "refused", f"the gate let the broken release pass ({verdict})")
            tolerated = self.application.rollout.steps[-1].margin
            if verdict.quality_lost is not None and verdict.quality_lost <= tolerated:
                stage.state = "refused"
                self.progress.say(
                    stage,
                    f"version {broken} {verdict}, and stays out: the champion answers so poorly that a broken release "
                    f"costs users {verdict.quality_lost:.2f}, no more than the rollout tolerates ({tolerated:g})",
                )
                return
            people.admit(
                self.settings,
                self.application,
                broken,
                actor="demo",
                reason="injected regression, let past the gate on purpose",
                simulated=True,
            )
            end = self.traffic_until_decided(stage, broken)
            require(end == "rollback", f"the broken release was not rolled back but ended with {end!r}")
            require(self.champion_now() == champion, "the champion changed")
            until(lambda: self.counted(stage), 300, "acknowledged exchanges did not reach silver/exchanges")

    # ---- what else a week brings

    def batch(self) -> None:
        with self.progress.stage("batch") as stage:
            asked = self.questions("live")[: self.application.demo.batch_questions]
            # Ids of the demo's own: what else is in the table, people asked.
            ids = {f"demo-{content_hash(one.question)[:16]}": one.question for one in asked}
            champion = self.champion_now()
            before = self._answers(ids, champion)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "demo.jsonl"
                lines = (json.dumps({"question_id": key, "question": text}) for key, text in ids.items())
                path.write_text("".join(f"{line}\n" for line in lines))
                submit_questions(self.settings, self.application, path, run=f"demo {self.crowd}", simulated=True)
            self.run_dag(stage, "batch_inference", {"batch": "demo", "retry_errors": True})
            answers = self._answers(ids, champion)
            require(len(answers) == len(ids), f"{len(answers)} of {len(ids)} questions are in gold/answers")
            errors = sum(error is not None for error in answers)
            require(errors == 0, f"{errors} of {len(ids)} questions have an error instead of an answer")
            stage.state = "nothing new" if before == answers else "running"
            self.progress.say(stage, f"version {champion} answered {len(ids)} questions on Spark, each once")

    def prompts(self) -> None:
        """A study of prompts; what it finds better goes through gate and rollout like everything else."""
        with self.progress.stage("prompts") as stage:
            run = self.run_dag(stage, "optimize_prompt")
            study = self.airflow.result(self.dag("optimize_prompt"), run.run_id, "study")
            found = f"{study['trials']} trials: {study['why']}"
            self.progress.say(stage, found)
            version = self.airflow.result(self.dag("optimize_prompt"), run.run_id, "release")["version"]
            if version is None or self.ended(version):
                stage.state = "nothing new"
                return
            verdict = self.evaluate(stage, version)
            told = f"{found}; version {version} {verdict}"
            if verdict.word == "passed":
                end = self.traffic_until_decided(stage, version)
                require(end != "freeze", f"the rollout of version {version} froze: {stage.detail}")
                told += f", and its rollout ended with {end}"
            stage.state = "refused" if verdict.word == "refused" else "running"
            self.progress.say(stage, told)

    def monitor(self) -> None:
        """A run over the time of this story: every exchange of it must be in its window's metrics."""
        with self.progress.stage("monitor") as stage:
            until(lambda: self.counted(stage), 300, "acknowledged exchanges did not reach silver/exchanges")
            now = datetime.now(UTC)
            since = touched(self.started, now, self.application.monitor.minutes)[0].start
            asked = pc.field("occurred_at") >= since
            there = self.lake.read(SILVER_EXCHANGES, ["completion_id"], where=asked).num_rows
            self.run_dag(stage, "monitor", logical_date=now, data_interval=(self.started, now))
            where = pc.field("interval_start") >= since
            measured = self.lake.read(GOLD_METRICS_HOURLY, ["interval_start", "exchanges"], where=where)
            counted = sum(measured["exchanges"].to_pylist())
            require(counted >= there, f"gold/metrics_hourly has {counted} of {there} exchanges")
            windows = len(set(measured["interval_start"].to_pylist()))
            breaches = self.lake.read(OPS_BREACHES, ["breach_id"], where=where).num_rows
            self.progress.say(stage, f"{counted} exchanges in {windows} windows, {breaches} breaches of the policy")

    def upkeep(self) -> None:
        with self.progress.stage("upkeep") as stage:
            run = self.run_dag(stage, "maintain_lakehouse")
            kept = self.airflow.result(self.dag("maintain_lakehouse"), run.run_id, "tidy")
            require(GOLD_METRICS_HOURLY.path in kept, "gold/metrics_hourly was not tidied")
            before, after = (sum(one[name] for one in kept.values()) for name in ("files_before", "files"))
            self.progress.say(stage, f"{len(kept)} tables: {before} files became {after}; the past stays readable")

    def _answers(self, questions: Iterable[str], version: str) -> list[str | None]:
        """The errors of these questions' answers by a release; None for each that has none."""
        where = pc.field("question_id").isin(list(questions)) & (pc.field("release_version") == version)
        errors: list[str | None] = self.lake.read(GOLD_ANSWERS, ["error"], where=where)["error"].to_pylist()
        return errors

    def _candidates(self, stage: Stage, finetuned: str) -> Iterator[str]:
        """The fine-tuned one, then the champion with each declared prompt."""
        yield finetuned
        for variant in self.application.prompt.variants:
            if variant != "broken":
                run = self.run_dag(stage, "declare_release", {"variant": variant})
                yield str(self.airflow.result(self.dag("declare_release"), run.run_id, "declare")["version"])
