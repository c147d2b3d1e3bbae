"""Once per question and release, on a real Spark with the real small model, whatever is killed."""

import dataclasses
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from millrace.batch import answering
from millrace.batch.inference import infer, pin
from millrace.errors import BatchError, LakehouseError, RetrievalError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_QUESTIONS, GOLD_ANSWERS, OPS_COSTS
from millrace.releases.package import read_release, verify_release
from millrace.releases.published_split import publish_split
from millrace.releases.split import Split
from tests.batch.a_run import QUESTIONS
from tests.batch.conftest import Served, Submit
from tests.conftest import free_port

EARLIER = datetime(2026, 1, 1, tzinfo=UTC)

pytestmark = [pytest.mark.spark, pytest.mark.model, pytest.mark.timeout(600)]


@pytest.fixture
def lake(served: Served) -> Lake:
    return Lake.of(served.settings, served.application.name)


def answered(lake: Lake, version: str) -> dict[str, dict[str, object]]:
    """Question → its row, for one release; fails if a question has two."""
    rows = [row for row in lake.read(GOLD_ANSWERS).to_pylist() if row["release_version"] == version]
    found = {row["question_id"]: row for row in rows}
    assert len(found) == len(rows), "a question was answered twice"
    return found


def ids(count: int) -> set[str]:
    return {f"q{number:02}" for number in range(count)}


def in_a_process(served: Served, mode: str, *arguments: str) -> subprocess.Popen[bytes]:
    given = served.settings.home / "given.pickle"
    given.write_bytes(pickle.dumps({"settings": served.settings, "application": served.application, "mode": mode}))
    program = Path(__file__).parent / "a_run.py"
    return subprocess.Popen([sys.executable, str(program), str(given), *arguments], cwd=Path(__file__).parents[2])


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_batch_that_is_killed_before_a_commit_and_run_again_answers_every_question_once(
    served: Served, lake: Lake, submit: Submit
) -> None:
    submit(6)
    killed = in_a_process(served, "batch", "2")
    assert killed.wait(300) == -signal.SIGKILL
    before = answered(lake, served.champion)
    assert before.keys() == ids(3), "the first slice is committed, the second is lost whole"
    assert lake.read(OPS_COSTS).num_rows == 2, "and both were paid for"

    done = infer(served.settings, served.application, run="again")
    assert (done["asked"], done["errors"], done["changed"]) == (3, 0, True)
    after = answered(lake, served.champion)
    assert after.keys() == ids(6)
    assert {name: after[name] for name in before} == before
    assert {after[name]["written_by"] for name in ids(6) - ids(3)} == {"again"}
    for number, question in enumerate(QUESTIONS[:6]):
        row = after[f"q{number:02}"]
        assert (row["question"], row["index_build"], row["mode"]) == (question, served.build, "batch")
        assert row["answer"]
        assert row["citations"]
    costs = lake.read(OPS_COSTS).to_pylist()
    assert {cost["stage"] for cost in costs} == {"batch"}
    assert {cost["release_id"] for cost in costs} == {after["q00"]["release_id"]}
    assert sum(cost["tokens"] for cost in costs if cost["tokens"]) > sum(
        row["prompt_tokens"] + row["completion_tokens"] for row in after.values()
    ), "the lost slice cost too"

    version = lake.version(GOLD_ANSWERS)
    assert infer(served.settings, served.application, run="once more")["changed"] is False
    assert lake.version(GOLD_ANSWERS) == version


@pytest.mark.long
def test_a_stream_that_is_killed_with_its_caller_goes_on_where_it_was_and_takes_turns_with_batches(
    served: Served, lake: Lake, submit: Submit
) -> None:
    submit(8)
    caller = in_a_process(served, "stream")
    wait_until(lambda: bool(answered(lake, served.champion)))
    workers = [process for process in psutil.process_iter(["cmdline"]) if works_on_a_stream(process)]
    caller.kill()
    for process in workers:
        process.kill()
    assert workers, "a micro-batch is worked on beside the server"
    caller.wait()
    before = answered(lake, served.champion)
    assert len(before) in (3, 6), "slices are whole"

    done = infer(served.settings, served.application, run="again", mode="stream")
    after = answered(lake, served.champion)
    assert after.keys() == ids(8)
    assert 0 < done["asked"] <= len(after) - len(before)
    assert {name: after[name] for name in before} == before
    assert {row["mode"] for row in after.values()} == {"stream"}

    submit(9)
    assert infer(served.settings, served.application, run="batch")["asked"] == 1
    submit(10)
    assert infer(served.settings, served.application, run="stream", mode="stream")["asked"] == 1
    modes = {name: row["mode"] for name, row in answered(lake, served.champion).items()}
    assert modes == dict.fromkeys(ids(8), "stream") | {"q08": "batch", "q09": "stream"}


def works_on_a_stream(process: psutil.Process) -> bool:
    return any("foreach_batch_worker" in word for word in process.info["cmdline"] or ())


@pytest.mark.long
def test_another_release_answers_anew_and_what_can_not_be_answered_is_a_row_that_can_be_asked_again(
    served: Served, lake: Lake, submit: Submit
) -> None:
    submit(2)
    long = {"question_id": "long", "question": "word " * 1000, "batch": "b", "simulated": True, "asked_at": EARLIER}
    lake.merge(BRONZE_QUESTIONS, pa.Table.from_pylist([long], schema=BRONZE_QUESTIONS.rows_schema), run="test")
    first = infer(served.settings, served.application, run="first")
    assert (first["asked"], first["errors"]) == (3, 1)
    row = answered(lake, served.champion)["long"]
    assert row["answer"] is None
    assert "shorten it" in str(row["error"])
    publish_split(served.settings, served.application.name, Split(sequence=1, champion=served.other))
    try:
        second = infer(served.settings, served.application, run="second", limit=2)
    finally:
        publish_split(served.settings, served.application.name, Split(sequence=2, champion=served.champion))
    assert (second["release_version"], second["asked"]) == (served.other, 2)
    assert answered(lake, served.other).keys() == {"long", "q00"}, "the oldest first"

    other = infer(served.settings, served.application, run="other", retry_errors=True, batch="typo")
    assert (other["asked"], other["changed"]) == (0, False)
    assert answered(lake, served.champion)["long"]["written_by"] == "first", "of another batch"
    again = infer(served.settings, served.application, run="again", retry_errors=True)
    assert (again["asked"], again["errors"]) == (1, 1)
    assert answered(lake, served.champion)["long"]["written_by"] == "again"
    later = infer(served.settings, served.application, run="again", retry_errors=True)
    assert later["asked"] == 0, "a later try of the same run"
    assert answered(lake, served.champion).keys() == ids(2) | {"long"}
    assert answered(lake, served.other)["long"]["written_by"] == "second", "others' errors stay"


def test_ids_that_stand_for_two_questions_are_refused_and_the_same_question_twice_is_one(
    served: Served, lake: Lake, submit: Submit
) -> None:
    submit(2)
    copied = lake.read(BRONZE_QUESTIONS)
    write_deltalake(lake.uri(BRONZE_QUESTIONS), copied, mode="append")  # as somebody's own pipeline might
    wrong = copied.slice(0, 1).set_column(1, "question", pa.array(["What is love?"]))
    write_deltalake(lake.uri(BRONZE_QUESTIONS), wrong, mode="append")
    for mode in ("batch", "stream"):
        with pytest.raises(
            BatchError, match=r"ids that stand for several questions \(q0.: .*'What is love\?'.*nothing was asked"
        ):
            infer(served.settings, served.application, run="test", mode=mode)
        assert not lake.exists(GOLD_ANSWERS)
    write_deltalake(lake.uri(BRONZE_QUESTIONS), pa.concat_tables([copied, copied]), mode="overwrite")
    assert infer(served.settings, served.application, run="test")["asked"] == 2
    assert answered(lake, served.champion).keys() == ids(2)


def test_nothing_to_ask_nobody_to_ask_and_nowhere_to_search_are_each_said(served: Served, submit: Submit) -> None:
    done = infer(served.settings, served.application, run="test")
    assert (done["questions_version"], done["asked"], done["changed"]) == (None, 0, False)
    submit(1)
    for choice in ({"limit": 1}, {"batch": "b"}, {"retry_errors": True}):
        with pytest.raises(BatchError, match="go with mode batch"):
            infer(served.settings, served.application, run="test", mode="stream", **choice)
    nobody = served.application.model_copy(update={"name": "nobody_released_this"})
    with pytest.raises(BatchError, match="nobody_released_this has no champion"):
        infer(served.settings, nobody, run="test")
    (served.settings.home / "indexes").unlink()
    with pytest.raises(RetrievalError, match="has no index build"):
        infer(served.settings, served.application, run="test")


def test_a_worker_on_another_machine_fetches_the_release_and_verifies_it(prepared: Served, tmp_path: Path) -> None:
    here = pin(prepared.settings, prepared.application)
    there = dataclasses.replace(here, folder=tmp_path / "not there", config=here.config | {"cache": str(tmp_path)})
    folder = answering._folder(there)
    assert folder != here.folder
    assert verify_release(folder, here.release_id) == read_release(here.folder)
    with pytest.raises(
        BatchError, match=rf"is {here.release_id} in the registry at .* and rel-other where the run began"
    ):
        answering._folder(dataclasses.replace(there, release_id="rel-other"))


def test_a_spark_that_is_not_there_is_said_and_nothing_is_written(served: Served, lake: Lake, submit: Submit) -> None:
    submit(1)
    gone = served.settings.model_copy(update={"spark_remote": f"sc://127.0.0.1:{free_port()}"})
    with pytest.raises(LakehouseError, match="can't be reached"):
        infer(gone, served.application, run="test")
    assert not lake.exists(GOLD_ANSWERS)
