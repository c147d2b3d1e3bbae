"""Cursors remember, and only ever move forward."""

import time
from multiprocessing.pool import Pool

import pytest

from millrace.lakehouse.cursors import move_cursor, read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_CURSORS
from millrace.settings import Settings
from tests.lakehouse.things import OTHER_THINGS, THINGS, move


@pytest.fixture
def lake(settings: Settings) -> Lake:
    return Lake.of(settings, "qa")


def test_a_cursor_says_how_far_its_reader_came_in_its_table(lake: Lake) -> None:
    assert read_cursor(lake, "embed", THINGS) is None
    move_cursor(lake, "embed", THINGS, 3, run="r")
    move_cursor(lake, "index", THINGS, 5, run="r")
    assert read_cursor(lake, "embed", THINGS) == 3
    assert read_cursor(lake, "index", THINGS) == 5
    assert read_cursor(lake, "embed", OTHER_THINGS) is None


def test_a_cursor_never_moves_back_and_a_repeat_commits_nothing(lake: Lake) -> None:
    move_cursor(lake, "embed", THINGS, 3, run="r")
    version = lake.version(OPS_CURSORS)
    move_cursor(lake, "embed", THINGS, 2, run="r")
    move_cursor(lake, "embed", THINGS, 3, run="r")
    assert read_cursor(lake, "embed", THINGS) == 3
    assert lake.version(OPS_CURSORS) == version


@pytest.mark.slow
def test_a_cursor_that_many_move_at_once_ends_at_the_furthest(lake: Lake, processes: Pool) -> None:
    start = time.time() + 0.3
    processes.starmap(move, [(lake.root, [writer, 10 - writer, 20 + writer], start) for writer in range(4)])
    assert read_cursor(lake, "reader", THINGS) == 23
    assert lake.read(OPS_CURSORS).num_rows == 1
