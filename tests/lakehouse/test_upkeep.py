"""What upkeep takes away and what it never does."""

import os
import re
import time
from pathlib import Path

import pytest

from millrace.errors import LakehouseError
from millrace.lakehouse.cursors import move_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_DECISIONS
from millrace.lakehouse.upkeep import keep_up
from millrace.rollout.decisions import State, append, decide, read_journal
from millrace.settings import Settings
from tests.lakehouse.things import THINGS, hashes, things

pytestmark = pytest.mark.slow


@pytest.fixture
def lake(settings: Settings) -> Lake:
    """Committed by delta-rs: Spark remembers a log as it was and can't be told that time has passed."""
    return Lake.of(settings, "qa")


@pytest.fixture
def written(lake: Lake) -> Lake:
    """Six commits: a row that changes with each, and one new row each."""
    for number in range(6):
        lake.merge(THINGS, things({"a": str(number), f"b{number}": "1"}), run="r")
    return lake


def files(lake: Lake) -> set[str]:
    return {name for _, _, names in os.walk(lake.uri(THINGS)) for name in names if name.endswith(".parquet")}


def age(lake: Lake, days: float) -> None:
    """As if all that is on disk had been written so long ago: file times, and the times in the log."""
    past = int(days * 86_400_000)
    for path in Path(lake.uri(THINGS)).rglob("*"):
        if path.suffix == ".json":
            path.write_text(re.sub(r"\b1[0-9]{12}\b", lambda stamp: str(int(stamp[0]) - past), path.read_text()))
        os.utime(path, (then := time.time() - past / 1000, then))


def test_many_files_become_few_and_the_content_and_the_feed_stay(written: Lake) -> None:
    written.merge(THINGS, things({"c": "1"}), run="r")
    before, feed = hashes(written.read(THINGS)), hashes(written.changes(THINGS, 2))
    kept = keep_up(written, THINGS)
    assert kept.files < kept.files_before
    assert kept.removed == 0, "nothing is older than its retention"
    assert hashes(written.read(THINGS)) == before
    assert hashes(written.changes(THINGS, 2)) == feed
    version = written.version(THINGS)
    keep_up(written, THINGS)
    assert written.version(THINGS) == version, "a second round commits nothing"


def test_what_only_old_versions_need_goes_and_the_table_is_whole(written: Lake) -> None:
    before = hashes(written.read(THINGS))
    age(written, 40)
    many = files(written)
    kept = keep_up(written, THINGS)
    assert kept.removed == len(many - files(written)) > 5
    assert hashes(written.read(THINGS)) == before
    version = written.version(THINGS)
    assert keep_up(written, THINGS).removed == 0
    assert written.version(THINGS) == version, "what went long ago is not committed again"


def test_a_reader_that_lags_behind_keeps_what_it_has_not_read(written: Lake) -> None:
    move_cursor(written, "slow", THINGS, 3, run="r")
    age(written, 40)
    feed = hashes(written.changes(THINGS, 3))
    kept = keep_up(written, THINGS)
    assert kept.kept_hours > 40 * 24
    assert hashes(written.changes(THINGS, 3)) == feed
    move_cursor(written, "slow", THINGS, written.version(THINGS) or 0, run="r")
    assert keep_up(written, THINGS).removed > 5


def test_a_version_that_something_names_stays_readable(written: Lake) -> None:
    age(written, 40)
    then = hashes(written.read(THINGS, version=4))
    keep_up(written, THINGS, needed=4)
    assert hashes(written.read(THINGS, version=4)) == then


def test_the_journal_keeps_its_numbers_and_goes_on(lake: Lake) -> None:
    state = State()
    for kind, fields in (("bootstrap", {"champion": "1"}), ("freeze", {}), ("resume", {})):
        decision = decide(state, kind, actor="ann", reason="because", **fields)
        append(lake, decision, run="r")
        state = state.after(decision)
    keep_up(lake, OPS_DECISIONS)
    append(lake, decide(state, "freeze", actor="ann", reason="again"), run="r")
    assert [decision.sequence for decision in read_journal(lake)] == [0, 1, 2, 3]


def test_a_table_that_is_not_there_is_one_sentence(lake: Lake) -> None:
    with pytest.raises(LakehouseError, match="there is no Delta table"):
        keep_up(lake, THINGS)


@pytest.mark.spark
def test_spark_makes_few_files_of_many_and_the_content_and_the_feed_stay(tmp_path: Path, spark_url: str) -> None:
    lake = Lake(str(tmp_path), "dev", "qa", spark_url=spark_url, spark_tables=frozenset({THINGS.path}))
    for number in range(3):
        lake.merge(THINGS, things({"a": str(number), f"b{number}": "1"}), run="r")
    before, feed = hashes(lake.read(THINGS)), hashes(lake.changes(THINGS, 1))
    kept = keep_up(lake, THINGS)
    assert (kept.files, kept.removed) == (1, 0)
    assert kept.files < kept.files_before
    assert hashes(lake.read(THINGS)) == before
    assert hashes(lake.changes(THINGS, 1)) == feed
