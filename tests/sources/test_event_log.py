"""The promises of the event log: on disk when acknowledged, alone with its torn lines, read back whole."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import SourceError
from millrace.sources.event_log import EventLog, Feedback, parse_event, read_events

HOUR = datetime(2026, 11, 24, 23, tzinfo=UTC)
EVER = (datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))


def feedback(number: int = 0, comment: str | None = None) -> Feedback:
    return Feedback(
        completion_id=f"chatcmpl-{number}", application="qa", simulated=True, rating=0.5, comment=comment, user="u"
    )


def ticking(start: datetime, step: timedelta):
    ticks = count()
    return lambda: start + step * next(ticks)


@pytest.mark.slow
def test_events_of_many_threads_are_each_on_disk_once_in_the_order_of_their_times(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with ThreadPoolExecutor(16) as threads:
        appended = list(threads.map(lambda number: log.append(feedback(number)), range(400)))
    lines = list(read_events(tmp_path, *EVER))
    assert sorted(line.event.completion_id for line in lines) == sorted(event.completion_id for event in appended)
    times = [line.event.occurred_at for line in lines]
    assert times == sorted(times)
    assert {line.event.event_id: line.event.occurred_at for line in lines} == {
        event.event_id: event.occurred_at for event in appended
    }


def test_an_event_loop_can_append_without_blocking(tmp_path: Path) -> None:
    log = EventLog(tmp_path)

    async def append_many() -> None:
        await asyncio.gather(*(log.append_async(feedback(number)) for number in range(100)))

    asyncio.run(append_many())
    log.close()
    assert len(list(read_events(tmp_path, *EVER))) == 100


def test_an_interval_reads_only_the_segments_of_its_hours(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "a", clock=ticking(HOUR, timedelta(minutes=20)))
    for number in range(9):
        log.append(feedback(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "2026-11-24T23-a-0.jsonl",
        "2026-11-25T00-a-1.jsonl",
        "2026-11-25T01-a-2.jsonl",
    ]
    found = list(read_events(tmp_path, HOUR + timedelta(minutes=20), HOUR + timedelta(minutes=80)))
    assert [line.event.completion_id for line in found] == ["chatcmpl-1", "chatcmpl-2", "chatcmpl-3"]
    # A segment of another hour isn't even opened: a folder in its place would be an error.
    (tmp_path / "2026-11-25T05-b-0.jsonl").mkdir()
    assert len(list(read_events(tmp_path, HOUR, HOUR + timedelta(hours=2)))) == 6


@pytest.fixture(scope="module")
def four_hours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve events in three hours, and a malformed line at the end of each segment."""
    folder = tmp_path_factory.mktemp("hours")
    log = EventLog(folder, "a", clock=ticking(HOUR, timedelta(minutes=13)))
    for number in range(12):
        log.append(feedback(number))
    for path in folder.iterdir():
        with path.open("a") as file:
            file.write("garbage\n")
    return folder


@given(cuts=st.lists(st.integers(0, 180), max_size=6))
def test_intervals_that_tile_time_see_every_line_exactly_once(four_hours: Path, cuts: list[int]) -> None:
    seen = [
        (line.segment, line.offset)
        for begin, end in pairwise(sorted({0, 240, *cuts}))
        for line in read_events(four_hours, HOUR + timedelta(minutes=begin), HOUR + timedelta(minutes=end))
    ]
    assert len(seen) == len(set(seen)) == 12 + 3


def test_a_clock_that_goes_back_does_not_take_times_back(tmp_path: Path) -> None:
    readings = iter([HOUR, HOUR + timedelta(hours=1), HOUR + timedelta(minutes=59)])
    log = EventLog(tmp_path, clock=lambda: next(readings))
    for number in range(3):
        log.append(feedback(number))
    later = HOUR + timedelta(hours=1)
    assert [line.at for line in read_events(tmp_path, *EVER)] == [HOUR, later, later]


def test_a_torn_last_line_is_no_event_and_nobody_appends_after_it(tmp_path: Path) -> None:
    first = EventLog(tmp_path, clock=lambda: HOUR)
    first.append(feedback(1))
    segment = next(tmp_path.iterdir())
    with segment.open("ab") as file:
        file.write(b'{"format":1,"kind":"feed')
    EventLog(tmp_path, clock=lambda: HOUR).append(feedback(2))
    assert sorted(line.event.completion_id for line in read_events(tmp_path, *EVER)) == ["chatcmpl-1", "chatcmpl-2"]
    assert segment.read_bytes().endswith(b'"feed')


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"hello", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "a JSON object is expected"),
        (b'{"format":1,"kind":"party"}', "kind"),
        (b'{"format":7,"kind":"feedback","new":1}', "written by a newer Millrace"),
        (b'{"format":1,"kind":"feedback","completion_id":"c"}', "Field required"),
    ],
)
def test_a_malformed_line_is_yielded_with_its_place_and_reason_and_the_rest_is_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    log = EventLog(tmp_path, clock=lambda: HOUR)
    log.append(feedback(1))
    segment = next(tmp_path.iterdir())
    offset = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(line + b"\n")
    log.append(feedback(2))
    good, bad, after = read_events(tmp_path, *EVER)
    assert (good.event.completion_id, after.event.completion_id) == ("chatcmpl-1", "chatcmpl-2")
    assert (bad.event, bad.segment, bad.offset, bad.at) == (None, segment.name, offset, HOUR)
    assert reason in bad.reason


def test_an_event_whose_time_is_not_in_its_segments_hour_is_malformed(tmp_path: Path) -> None:
    text = feedback().model_copy(update={"occurred_at": HOUR + timedelta(days=3)}).model_dump_json()
    (tmp_path / "2026-11-24T23-x-0.jsonl").write_text(text + "\n")
    (line,) = read_events(tmp_path, HOUR, HOUR + timedelta(hours=1))
    assert "outside the hour" in line.reason


@settings(max_examples=25)
@given(comment=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_comes_back_as_it_went_in(tmp_path_factory: pytest.TempPathFactory, comment: str) -> None:
    folder = tmp_path_factory.mktemp("text")
    log = EventLog(folder)
    appended = log.append(feedback(comment=comment))
    (line,) = read_events(folder, *EVER)
    assert line.event == appended
    assert parse_event(line.text) == appended


@pytest.mark.slow
def test_what_was_acknowledged_before_kill_9_is_in_the_log_exactly_once(tmp_path: Path) -> None:
    program = """
import sys, threading
from pathlib import Path
from millrace.sources.event_log import EventLog, Feedback
log = EventLog(Path(sys.argv[1]))
def work(thread):
    for n in range(10**6):
        name = f"{thread}-{n}"
        log.append(Feedback(completion_id=name, application="qa", simulated=False, rating=1, comment="x" * 500))
        sys.stdout.write(name + "\\n"); sys.stdout.flush()
for thread in range(8):
    threading.Thread(target=work, args=(thread,)).start()
"""
    writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    acknowledged = [writer.stdout.readline() for _ in range(300)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += writer.stdout.read().splitlines(keepends=True)
    writer.wait()
    whole = {line.strip() for line in acknowledged if line.endswith("\n") and line.count("-") == 1}
    found = [line.event.completion_id for line in read_events(tmp_path, *EVER)]
    assert len(found) == len(set(found))
    assert len(whole) >= 300
    assert whole <= set(found)


def test_a_segment_that_could_only_half_be_begun_keeps_no_later_event_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path, clock=lambda: HOUR)

    def refused(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refused)
        with pytest.raises(SourceError, match="Input/output error"):
            log.append(feedback(1))
    log.append(feedback(2))
    assert [line.event.completion_id for line in read_events(tmp_path, *EVER)] == ["chatcmpl-2"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small tmpfs")
def test_a_full_disk_refuses_with_one_sentence_and_the_log_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        log = EventLog(disk / "events", clock=lambda: HOUR)
        acknowledged = 0

        def fill() -> None:
            nonlocal acknowledged
            while True:
                log.append(feedback(acknowledged, comment="x" * 3000))
                acknowledged += 1

        with pytest.raises(SourceError, match="No space left on device; free space") as refusal:
            fill()
        assert "\n" not in str(refusal.value)
        lines = list(read_events(disk / "events", *EVER))
        assert [line.event.completion_id for line in lines] == [f"chatcmpl-{n}" for n in range(acknowledged)]
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        log.append(feedback(acknowledged))
        assert len(list(read_events(disk / "events", *EVER))) == acknowledged + 1
        assert all(json.loads(line.text) for line in read_events(disk / "events", *EVER))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
