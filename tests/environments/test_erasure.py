"""A user who asks for it is gone: from tables, files and logs, for good, with a trail that says so and nothing more."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from typer.testing import CliRunner

from millrace.applications import Application
from millrace.cli import app
from millrace.environments import erasure, erasure_search
from millrace.environments.audit import search, verify
from millrace.environments.erasure import erase, finish_erasures, preview
from millrace.environments.erasure_search import Found, mentions
from millrace.errors import ConflictError, ErasureError, LakehouseError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.cursors import move_cursor, read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    BRONZE_EVENTS,
    GOLD_PREFERENCE_EXAMPLES,
    GOLD_TRAINING_EXAMPLES,
    OPS_ERASURES,
    QUARANTINE_FEEDBACK,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
    TABLES,
)
from millrace.lakehouse.upkeep import keep_up
from millrace.releases.registry import RELEASE_TAG
from millrace.serving.metrics import Metrics
from millrace.serving.traces import ExchangeTraces
from millrace.settings import Settings
from millrace.sources.completion_id import issue
from millrace.sources.erased import (
    Erasure,
    Questions,
    erasures_seen,
    hashed_question,
    read_erasures,
    require_nobody_erased,
    write_erasures,
)
from millrace.sources.event_log import Accepted, Completed, EventLog, Feedback, read_events
from millrace.sources.feedback import land_events, refine_feedback
from millrace.sources.pseudonym import note_key, noted_in, pseudonym
from tests.lakehouse import test_forgetting

KEY = b"test completion key"
HOUR = timedelta(hours=1)
START = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - 5 * HOUR
WHY = Questions(frozenset({"Why?"}), frozenset(), b"")
ANN, BOB = (pseudonym(b"test pseudonym key", name) for name in ("ann", "bob"))


def holders(folder: Path, secret: str) -> list[str]:
    return test_forgetting.holders(SubTreeFileSystem(str(folder), LocalFileSystem()), secret)


class Talk:
    """Asks, answers and rates in one application, as its gateway writes it."""

    def __init__(self, settings: Settings, application: str) -> None:
        self.at = START
        self.application = application
        self.lake = Lake.of(settings, application)
        self.folder = settings.event_log(application)
        self.log = EventLog(self.folder, clock=lambda: self.at)

    def exchange(self, user: str, name: str, **said: Any) -> str:
        """A question, its answer and, where `said`, feedback; the completion's id. All texts hold `name`."""
        self.at += timedelta(seconds=1)
        about = {
            "completion_id": issue(KEY, self.application, self.at),
            "application": self.application,
            "simulated": False,
            "user": user,
            "question": f"what does {name} ask?",
            "release_id": "rel-1",
            "release_version": "1",
            "index_build": "build-1",
            "prompt_version": "qa/1",
            "rollout_id": None,
            "epoch": None,
            "arm": None,
            "assignment_probability": None,
            "pinned": False,
            "accepted_at": self.at,
        }
        self.log.append(Accepted(**about))
        done = {
            "answer": f"the answer to {name}",
            "citations": (),
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "seconds": 0.1,
            "cost_usd": 0.0,
            "from_cache": False,
            "fell_back": False,
        }
        self.log.append(Completed(**about | done))
        if said:
            self.rate(str(about["completion_id"]), **said)
        return str(about["completion_id"])

    def rate(self, completion_id: str, **said: Any) -> None:
        about = {"completion_id": completion_id, "application": self.application, "simulated": False, "rating": 0.0}
        self.log.append(Feedback(**about | said))


@pytest.fixture
def prod(settings: Settings, mlflow_uri: str) -> Settings:
    """Where nothing is traced."""
    return settings.model_copy(update={"environment": "prod", "mlflow_uri": mlflow_uri})


@pytest.fixture
def own(prod: Settings, qa: Application) -> Application:
    """An application of two releases, the second with weights that went through two sets."""
    made = qa.model_copy(update={"name": f"qa_{uuid.uuid4().hex[:8]}"})
    client = mlflow.MlflowClient(tracking_uri=prod.mlflow_url, registry_uri=prod.mlflow_url)
    client.create_registered_model(made.name)
    run = client.create_run("0").info
    for tags in ({"training_set": "train-0"}, {"training_set": "train-9", "earlier_training_sets": "train-1"}):
        client.create_model_version(
            made.name,
            source=f"{run.artifact_uri}/release",
            run_id=run.run_id,
            tags={RELEASE_TAG: "r", **tags},
            await_creation_for=0,
        )
    return made


@pytest.fixture
def talk(prod: Settings, own: Application) -> Talk:
    return Talk(prod, own.name)


@pytest.fixture
def ingest(prod: Settings, own: Application) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        landed = land_events(prod, own, START, START + 4 * HOUR, run="test")
        refine_feedback(prod, own, START, START + 4 * HOUR, run="test")
        return landed

    return run


def example(question: str, origin: str, **changes: Any) -> dict[str, Any]:
    return {
        "training_set": "train-1",
        "example_id": content_hash(origin, question),
        "origin": origin,
        "simulated": False,
        "section": None,
        "question": question,
        "answer": "a",
        "chunk_ids": [],
        "prompt": question,
    } | changes


def everything(talk: Talk, ingest: Callable[[], object], settings: Settings) -> Lake:
    """Of ann and bob: exchanges, feedback, quarantine, training and preference examples, a fine-tune's files, and what
    no ingestion has seen."""
    lake = talk.lake
    for user, name in ((ANN, "Ann of Arc"), (BOB, "Bob Moog")):
        talk.exchange(user, name, comment=f"{name} says no", correction=f"{name} knows better")
        talk.exchange(user, name, rating=7.0, comment=f"{name} can't count")  # refused: out of range
    about = talk.exchange(BOB, "Bob Moog, whom somebody corrects")
    talk.rate(about, user=ANN, correction="Ann of Arc knows better than bob")
    torn = f'{{"kind": "accepted", "user": "{ANN}", "question": "Ann of Arc, torn'
    next(talk.folder.glob("*.jsonl")).open("a").write(f"{torn}\n")
    ingest()
    for name in ("Ann of Arc", "Bob Moog"):
        question = f"what does {name} ask?"
        rows = [example(question, "correction"), example(f"{question} (of a document)", "document")]
        lake.merge(
            GOLD_TRAINING_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema), run="test"
        )
        preferred = example(question, "ratings", training_set="prefer-1", chosen="b", rejected=f"{name} was told this")
        lake.merge(
            GOLD_PREFERENCE_EXAMPLES,
            pa.Table.from_pylist([preferred], schema=pa.schema(GOLD_PREFERENCE_EXAMPLES.columns)),
            run="test",
        )
        run = settings.home / "training" / "prod" / talk.application / "run-1"
        run.mkdir(parents=True, exist_ok=True)
        with (run / "examples.jsonl").open("a") as file:
            file.write(json.dumps({"question": question, "prompt": f"Answer: {question}", "answer": "a"}) + "\n")
        talk.at = START + 5 * HOUR  # of an hour that nobody has ingested
        talk.exchange(ANN if name.startswith("Ann") else BOB, f"{name}, late")
        talk.at = START
    return lake


def counts(lake: Lake) -> dict[str, int]:
    tables = (BRONZE_EVENTS, QUARANTINE_FEEDBACK, SILVER_EXCHANGES, SILVER_FEEDBACK, GOLD_PREFERENCE_EXAMPLES)
    return {table.path: lake.read(table).num_rows for table in tables}


def test_nothing_of_a_user_is_left_on_disk_and_everything_of_others_is(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application
) -> None:
    lake = everything(talk, ingest, prod)
    before = counts(lake)
    assert len(holders(prod.home, "Ann of Arc")) > 10

    told = preview(prod, own, ANN)
    assert (told.lines, told.files, told.trained) == (10, 1, ("2",))
    assert counts(lake) == before, "a preview changes nothing"
    assert not lake.exists(OPS_ERASURES)

    report = erase(prod, own, ANN, actor="person/otto", run="test")
    assert report.erased
    assert report.trained == ("2",)
    assert (report.lines, report.rows) == (told.lines, told.rows)
    assert report.rows == {
        GOLD_TRAINING_EXAMPLES.path: 1,
        GOLD_PREFERENCE_EXAMPLES.path: 1,
        BRONZE_EVENTS.path: 7,
        QUARANTINE_FEEDBACK.path: 2,
        SILVER_FEEDBACK.path: 2,
        SILVER_EXCHANGES.path: 2,
    }

    left = [name for name in holders(prod.home, "Ann of Arc") if "(of a document)" not in name]
    texts = [lake.read(GOLD_TRAINING_EXAMPLES)["question"].to_pylist()]
    assert texts == [[q for q in texts[0] if "document" in q or "Bob" in q]]
    # What is left of the name is a question that a document gave.
    assert all(name.startswith(f"lake/prod/{own.name}/gold/training_examples") for name in left), left
    assert holders(prod.home, ANN) == [name for name in holders(prod.home, ANN) if "ops/" in name]
    after = counts(lake)
    assert {path: before[path] - after[path] for path in after} == {path: report.rows[path] for path in after}
    assert all(after.values()), "bob's are there"
    assert len(holders(prod.home, "Bob Moog")) > 5


@pytest.mark.spark
def test_what_spark_commits_to_is_erased_by_spark(
    spark_url: str, settings: Settings, own: Application, prod: Settings
) -> None:
    tables = frozenset({SILVER_EXCHANGES.path, SILVER_FEEDBACK.path, GOLD_TRAINING_EXAMPLES.path, BRONZE_EVENTS.path})
    on_spark = prod.model_copy(update={"spark_remote": spark_url, "spark_tables": tables})
    talk = Talk(on_spark, own.name)

    def ingest() -> None:
        land_events(on_spark, own, START, START + 4 * HOUR, run="test")
        refine_feedback(on_spark, own, START, START + 4 * HOUR, run="test")

    lake = everything(talk, ingest, on_spark)
    before = counts(lake)
    report = erase(on_spark, own, ANN, actor="person/otto", run="test")
    assert report.erased, report.waiting
    assert (report.rows[BRONZE_EVENTS.path], report.rows[SILVER_EXCHANGES.path]) == (7, 2)
    assert {path: before[path] - counts(lake)[path] for path in before} == {path: report.rows[path] for path in before}
    left = holders(on_spark.home, "Ann of Arc")
    assert all(f"{own.name}/gold/training_examples" in name for name in left), left  # a document's question
    for table in tables:
        commits = DeltaTable(lake.uri(TABLES[table])).history()
        engines = {one.get("engineInfo", "") for one in commits if one["version"]}  # the empty table is delta-rs's
        assert engines == {"Apache-Spark/4.1.4 Delta-Lake/4.4.0"}, table
    ingest()
    assert ANN not in lake.read(SILVER_EXCHANGES)["user"].to_pylist()
    assert finish_erasures(on_spark, own, run="nightly") == []


def test_in_dev_the_traces_of_the_users_exchanges_go(settings: Settings, mlflow_uri: str, own: Application) -> None:
    dev = settings.model_copy(update={"mlflow_uri": mlflow_uri, "trace_exchanges": True})
    talk = Talk(dev, own.name)
    for user, name in ((ANN, "Ann of Arc"), (BOB, "Bob Moog")):
        talk.exchange(user, name)
    traces = ExchangeTraces(dev, own.name, Metrics())
    traces.start()
    for line in read_events(talk.folder, START, START + HOUR):
        if isinstance(line.event, Completed):
            traces.offer(line.event)
    traces.stop()

    def traced() -> list[str]:
        client = mlflow.MlflowClient(tracking_uri=mlflow_uri)
        experiment = client.get_experiment_by_name(f"{own.name}/traces")
        found = client.search_traces(locations=[experiment.experiment_id])
        return sorted(trace.data.spans[0].inputs["question"] for trace in found)

    assert traced() == ["what does Ann of Arc ask?", "what does Bob Moog ask?"]
    report = erase(dev, own, ANN, actor="person/otto", run="test")
    assert (report.traces, report.erased) == (1, True)
    assert traced() == ["what does Bob Moog ask?"]


def test_what_arrives_late_or_is_ingested_again_does_not_bring_the_user_back(
    talk: Talk, ingest: Callable[[], dict[str, Any]], prod: Settings, own: Application
) -> None:
    lake = everything(talk, ingest, prod)
    of_ann = talk.exchange(ANN, "Ann of Arc, once more")
    ingest()
    erase(prod, own, ANN, actor="person/otto", run="test")
    before = counts(lake)
    # A gateway elsewhere sends its segment now, and somebody rates one of ann's answers.
    other = Talk(prod, own.name)
    missed = other.exchange(ANN, "Ann of Arc, late")
    other.rate(of_ann, comment="Ann of Arc, late, again")
    other.exchange(BOB, "Bob Moog, late")
    told = ingest()
    assert (told["erased"], told["landed"]) == (3, 2)
    assert holders(talk.folder, "Ann of Arc, late") == []
    other.rate(missed, comment="Ann of Arc, later still")
    assert ingest()["erased"] == 1
    assert {path: counts(lake)[path] - before[path] for path in before} == {
        path: {BRONZE_EVENTS.path: 2, SILVER_EXCHANGES.path: 1}.get(path, 0) for path in before
    }
    assert ANN not in lake.read(SILVER_EXCHANGES)["user"].to_pylist()


def test_who_comes_back_counts_again_and_can_be_erased_again(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application
) -> None:
    lake = talk.lake
    talk.exchange(ANN, "Ann of Arc")
    ingest()
    first = erase(prod, own, ANN, actor="person/otto", run="test")
    assert first.erased
    again = erase(prod, own, ANN, actor="person/otto", run="test")
    assert again.erased
    assert again.nothing
    assert len(search(prod, action="erasure")) == 2, "erasing nobody is nothing to tell"

    talk.at = datetime.now(UTC) - timedelta(seconds=1)
    talk.exchange(ANN, "Ann of Arc")
    end = talk.at + timedelta(seconds=-5)
    land_events(prod, own, end, talk.at + timedelta(seconds=1), run="test")
    refine_feedback(prod, own, end, talk.at + timedelta(seconds=1), run="test")
    assert lake.read(SILVER_EXCHANGES)["user"].to_pylist() == [ANN]
    assert finish_erasures(prod, own, run="nightly") == [], "what came later is not what was asked for"
    assert erase(prod, own, ANN, actor="person/otto", run="test").rows[SILVER_EXCHANGES.path] == 1
    assert lake.read(SILVER_EXCHANGES).num_rows == 0


def test_the_trail_says_who_erased_whom_by_pseudonym_alone(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application
) -> None:
    everything(talk, ingest, prod)
    erase(prod, own, ANN, actor="person/otto", run="test")
    begun, erased = search(prod, action="erasure")
    assert [(one["actor"], one["resource"], one["outcome"]) for one in (begun, erased)] == [
        ("person/otto", f"user/{ANN}", "begun"),
        ("person/otto", f"user/{ANN}", "erased"),
    ]
    assert erased["details"]["counts"][SILVER_FEEDBACK.path] == 2
    assert erased["details"]["training_sets"] == ["prefer-1", "run-1", "train-1"]
    assert erased["details"]["releases"] == ["2"]
    assert verify(prod).entries == 2


def test_the_bytes_wait_for_a_reader_that_has_not_read_and_go_when_it_has(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application
) -> None:
    lake = everything(talk, ingest, prod)
    move_cursor(lake, "slow", SILVER_EXCHANGES, 0, run="test")
    report = erase(prod, own, ANN, actor="person/otto", run="test")
    assert report.waiting == {SILVER_EXCHANGES.path: "slow has not read its changes yet"}
    assert not report.erased
    assert ANN not in lake.read(SILVER_EXCHANGES)["user"].to_pylist()
    folder = Path(lake.uri(SILVER_EXCHANGES))
    assert holders(folder, "what does Ann of Arc ask?")
    (told,) = finish_erasures(prod, own, run="nightly")
    assert told["waiting"] == dict(report.waiting)

    version = lake.version(SILVER_EXCHANGES)
    move_cursor(lake, "slow", SILVER_EXCHANGES, version - 1, run="test")  # type: ignore[operator]
    (told,) = finish_erasures(prod, own, run="nightly")
    assert told == {"user": ANN, "rows": told["rows"], "waiting": {}}
    assert holders(folder, "what does Ann of Arc ask?") == []
    assert read_cursor(lake, "slow", SILVER_EXCHANGES) == version
    assert finish_erasures(prod, own, run="nightly") == []
    assert [entry["outcome"] for entry in search(prod, action="erasure")] == ["begun", "waiting", "erased"]


KILLED = """
import os, signal, sys
from pathlib import Path
from millrace.environments import erasure, erasure_search
from millrace.applications import Application
from millrace.settings import Settings

place = sys.argv[2]
def dies(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if place == "delete":
    real, calls = erasure.Lake.delete, []
    def after_two(self, *args):
        calls.append(1)
        return real(self, *args) if len(calls) < 5 else dies()  # bronze is gone then
    erasure.Lake.delete = after_two
else:
    setattr(erasure, place, dies)
settings = Settings(home=Path(sys.argv[1]), environment="prod", spark_tables=frozenset(), mlflow_uri=sys.argv[5])
own = Application.model_validate_json(sys.argv[3])
erasure.erase(settings, own, sys.argv[4], actor="person/otto", run="killed")
"""


@pytest.mark.parametrize("place", ["erase_lines", "delete", "look", "forget_removed"])
def test_killed_anywhere_the_night_does_the_rest(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application, place: str
) -> None:
    everything(talk, ingest, prod)
    command = [sys.executable, "-c", KILLED, str(prod.home), place, own.model_dump_json(), ANN, prod.mlflow_uri]
    killed = subprocess.run(command, capture_output=True, text=True)
    if place == "look":  # before anything was noted: the caller knows that it isn't done
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert erase(prod, own, ANN, actor="person/otto", run="test").erased
    else:
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        (told,) = finish_erasures(prod, own, run="nightly")
        assert told["waiting"] == {}
    left = [name for name in holders(prod.home, "Ann of Arc") if "gold/training_examples" not in name]
    assert left == []
    assert finish_erasures(prod, own, run="nightly") == []
    assert [entry["outcome"] for entry in search(prod, action="erasure")] == ["begun", "erased"]


def test_a_line_that_was_half_blanked_is_blanked_and_no_event(
    talk: Talk, ingest: Callable[[], dict[str, Any]], prod: Settings, own: Application
) -> None:
    talk.exchange(ANN, "Ann of Arc")
    segment = next(talk.folder.glob("*.jsonl"))
    size = segment.stat().st_size
    with segment.open("r+b") as file:  # as a kill between the two writes leaves it
        os.pwrite(file.fileno(), b" ", 0)
    assert ingest()["lines"] == 1
    erase(prod, own, ANN, actor="person/otto", run="test")
    assert segment.stat().st_size == size
    assert segment.read_text().strip() == ""
    talk.exchange(BOB, "Bob Moog")  # the gateway goes on in the same segment
    assert ingest()["landed"] == 2


def test_the_command_asks_first_and_says_what_it_did(prod: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    Talk(prod, "qa").exchange(ANN, "Ann of Arc")
    for name, value in {
        "HOME": str(prod.home),
        "ENVIRONMENT": "prod",
        "SPARK_TABLES": "[]",
        "PSEUDONYM_KEY": "test pseudonym key",
        "MLFLOW_URI": prod.mlflow_uri,
        "APPLICATIONS": str(Path(__file__).parents[1] / "applications"),
    }.items():
        monkeypatch.setenv(f"MILLRACE_{name}", value)
    run = CliRunner()
    dry = run.invoke(app, ["erase", "ann", "-a", "qa", "--dry-run"])
    assert dry.stdout == f"qa: user {ANN}. There is: lines of the event log 2.\n"
    assert dry.exit_code == 0
    refused = run.invoke(app, ["erase", "ann", "-a", "qa"], input="n\n")
    assert refused.exit_code == 1
    assert run.invoke(app, ["erase", "ann", "-a", "qa", "--dry-run"]).stdout == dry.stdout
    done = run.invoke(app, ["erase", "ann"], input="y\n")
    assert done.exit_code == 0, done.stdout
    assert f"qa: user {ANN}. Erased: lines of the event log 2.\n" in done.stdout
    assert f"handbook: user {ANN}. Erased: nothing.\n" in done.stdout
    known = json.loads(run.invoke(app, ["erase", ANN, "--pseudonym", "--yes", "--json"]).stdout)
    assert {report["application"]: report["erased"] for report in known} == {"qa": True, "handbook": True}
    wrong = run.invoke(app, ["erase", "ann", "--pseudonym"])
    assert "'ann' is no pseudonym" in wrong.stderr
    note_key(b"test pseudonym key", noted_in(prod))
    monkeypatch.setenv("MILLRACE_PSEUDONYM_KEY", "another")
    assert "would be a stranger" in run.invoke(app, ["erase", "ann", "--dry-run"]).stderr
    monkeypatch.delenv("MILLRACE_PSEUDONYM_KEY")
    assert "there is no key to make pseudonyms with" in run.invoke(app, ["erase", "ann"]).stderr


def test_what_is_made_of_questions_while_somebody_is_erased_is_not_kept(
    talk: Talk, prod: Settings, own: Application
) -> None:
    seen = erasures_seen(talk.lake)
    require_nobody_erased(talk.lake, seen)
    talk.exchange(ANN, "Ann of Arc")
    erase(prod, own, ANN, actor="person/otto", run="test")
    with pytest.raises(ConflictError, match="was erased while this was made of what users asked"):
        require_nobody_erased(talk.lake, seen)
    seen = erasures_seen(talk.lake)
    talk.exchange(BOB, "Bob Moog")
    erase(prod, own, BOB, actor="person/otto", run="test")
    with pytest.raises(ConflictError):
        require_nobody_erased(talk.lake, seen)
    seen, version = erasures_seen(talk.lake), talk.lake.version(OPS_ERASURES)
    assert keep_up(talk.lake, OPS_ERASURES).files == 1
    assert talk.lake.version(OPS_ERASURES) != version
    require_nobody_erased(talk.lake, seen)


def test_somebody_who_writes_all_the_time_is_named_a_reason(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything(talk, ingest, prod)
    monkeypatch.setattr(erasure, "_delete", lambda *_: {})
    with pytest.raises(
        ErasureError, match=r"was written 5 times .* pause \w+.ingest_feedback, then run `millrace erase`"
    ):
        erase(prod, own, ANN, actor="person/otto", run="test")


def test_one_users_erasure_that_fails_stops_nobody_elses(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything(talk, ingest, prod)
    for user in (ANN, BOB):
        begun = Erasure(user, datetime.now(UTC), None, frozenset(), {})
        write_erasures(talk.lake, [begun], run="test")
    first = read_erasures(talk.lake)[0].user
    real = erasure._delete

    def fails(settings: Settings, application: Application, found: Found) -> dict[str, int]:
        if found.erasure.user == first:
            raise LakehouseError("the disk is full")
        return real(settings, application, found)

    monkeypatch.setattr(erasure, "_delete", fails)
    with pytest.raises(ErasureError, match=f"^{own.name}: user {first}: the disk is full$"):
        finish_erasures(prod, own, run="nightly")
    assert {one.user: one.done_at is None for one in read_erasures(talk.lake)} == {ANN: first == ANN, BOB: first == BOB}
    assert set(talk.lake.read(SILVER_EXCHANGES)["user"].to_pylist()) == {first}


@pytest.mark.parametrize(
    ("line", "theirs"),
    [
        ({"question": " Why? ", "prompt": "Answer: Why?", "answer": "So."}, True),
        ({"question": "It fails. Why?", "prompt": "Answer: It fails. Why?", "answer": "So."}, False),
        ({"question": "What now?", "prompt": "Somebody asks: Why?\nWhat now?", "answer": "So."}, False),
        ({"prompt": "Answer:\nWhy?", "answer": "as files once were"}, True),
        ({"prompt": "Answer:\nAnyWhy?s", "answer": "as files once were"}, False),
    ],
)
def test_a_short_question_takes_nobody_elses_line(line: dict[str, str], theirs: bool) -> None:
    assert mentions(json.dumps(line), WHY) == theirs


def test_a_torn_line_goes_with_what_is_left_of_the_question() -> None:
    assert mentions('{"prompt": "Answer:\\nWhy?", "answ', WHY)


@pytest.mark.parametrize("name", ["examples.jsonl", "answers.jsonl", "pairs.jsonl"])
def test_a_file_is_found_by_its_lines_alone(prod: Settings, qa: Application, name: str) -> None:
    run = prod.home / "training" / "prod" / qa.name / "run-1"
    run.mkdir(parents=True)
    lines = [json.dumps({"question": one, "prompt": one}) for one in ("It fails. Why?", "What now?")]
    (run / name).write_text("\n".join(lines))
    for asked, files in (("Why?", []), ("What now?", [run / name])):
        assert list(erasure_search._files(prod, qa.name, Questions(frozenset({asked}), frozenset(), b""))) == files


def test_what_comes_back_in_gold_after_the_questions_are_gone_is_found_by_their_hashes(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application
) -> None:
    everything(talk, ingest, prod)
    erase(prod, own, ANN, actor="person/otto", run="test")
    assert finish_erasures(prod, own, run="nightly") == []
    # A set that was being merged at that moment, and what a fine-tune wrote of it.
    question = "what does Ann of Arc ask?"
    rows = [example(f"{question} ", "correction"), example("what does Bob Moog ask?", "correction")]
    talk.lake.merge(
        GOLD_TRAINING_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema), run="test"
    )
    file = prod.home / "training" / "prod" / own.name / "run-1" / "examples.jsonl"
    file.write_text("".join(json.dumps({"question": row["question"], "prompt": "p"}) + "\n" for row in rows))
    (told,) = finish_erasures(prod, own, run="nightly")
    assert told["rows"][GOLD_TRAINING_EXAMPLES.path] == 1
    left = [one for one in talk.lake.read(GOLD_TRAINING_EXAMPLES)["question"].to_pylist() if "document" not in one]
    assert left == ["what does Bob Moog ask?"]
    assert "Ann of Arc" not in file.read_text()
    assert "Bob Moog" in file.read_text()
    assert finish_erasures(prod, own, run="nightly") == []
    assert [entry["outcome"] for entry in search(prod, action="erasure")] == ["begun", "erased"] * 2


def test_a_question_that_others_have_asked_since_is_theirs(
    talk: Talk, ingest: Callable[[], object], prod: Settings, own: Application
) -> None:
    everything(talk, ingest, prod)
    erase(prod, own, ANN, actor="person/otto", run="test")
    Talk(prod, own.name).exchange(BOB, "Ann of Arc", correction="Bob Moog knows better")  # the same question
    ingest()
    rows = [example("what does Ann of Arc ask?", "correction")]
    talk.lake.merge(
        GOLD_TRAINING_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema), run="test"
    )
    assert finish_erasures(prod, own, run="nightly") == []
    (known,) = read_erasures(talk.lake)
    assert hashed_question(b"test pseudonym key", "what does Ann of Arc ask?") in known.told["questions"]
