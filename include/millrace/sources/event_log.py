"""What happened at the gateway, as lines on disk: an event that was appended survives `kill -9`, and counts once.

Each gateway process appends to segments of its own, one an hour (`2026-11-24T23-<instance>.jsonl`), so that an
interval reads only its hours and nobody ever appends after a torn line. This module knows the records, how they are
written and how they are read back; what they mean for tables is `feedback.py`'s business.
"""

import asyncio
import errno
import os
import secrets
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from millrace.errors import SourceError

FORMAT = 1
HOUR = timedelta(hours=1)
CLIENT_LEFT = "the client left before the answer was complete"
"""Error of a failed exchange that is nobody's fault: no evidence against a release."""

_APPENDING_AT_ONCE = 16


class Record(BaseModel):
    """What every event has. Unknown fields are refused: a newer writer raises `format` instead."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    event_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    completion_id: str
    application: str
    simulated: bool
    occurred_at: AwareDatetime | None = None
    """The log sets it, on writing; a line without it is malformed."""


class Exchange(Record):
    """What is known before the first word: every event of an exchange repeats it, so that any one line suffices."""

    user: str
    """Keyed pseudonym."""
    question: str
    release_id: str
    """What answers, or was about to: after a fall-back the champion, though `arm` stays `challenger`."""
    release_version: str
    index_build: str
    """Empty where the index could not be read."""
    prompt_version: str
    rollout_id: str | None
    epoch: int | None
    arm: Literal["champion", "challenger"] | None
    assignment_probability: float | None
    pinned: bool
    accepted_at: AwareDatetime
    """When the request arrived."""


class Accepted(Exchange):
    """On disk before the first byte of an answer leaves."""

    kind: Literal["accepted"] = "accepted"


class Completed(Exchange):
    """On disk before the last byte leaves."""

    kind: Literal["completed"] = "completed"
    answer: str
    citations: tuple[str, ...]
    """Chunk ids, best first."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost_usd: float
    from_cache: bool
    fell_back: bool
    error: str | None = None
    """Why the challenger did not answer, where the champion did instead."""


class Failed(Exchange):
    """No complete answer left; `answer` is what had been sent."""

    kind: Literal["failed"] = "failed"
    answer: str | None
    seconds: float
    error: str
    fell_back: bool = False


class Feedback(Record):
    """What a person said of an answer. The range of a rating is not checked here: a bad line is kept, then refused."""

    kind: Literal["feedback"] = "feedback"
    user: str | None = None
    """Keyed pseudonym of who rated, where the caller said so."""
    rating: float | None
    comment: str | None = None
    correction: str | None = None


Event = Annotated[Accepted | Completed | Failed | Feedback, Field(discriminator="kind")]
AnyRecord = TypeVar("AnyRecord", bound=Record)
_EVENT: TypeAdapter[Accepted | Completed | Failed | Feedback] = TypeAdapter(Event)


@dataclass(frozen=True)
class Line:
    """One complete line of a segment: an event, or the reason why it can't be read as one."""

    segment: str
    """File name."""
    offset: int
    """Bytes before the line."""
    text: str
    """As it was found, without the newline; bytes that are no text appear as `\\x..`."""
    at: datetime
    """When it was written: a malformed line counts as written with the line before it, or with its hour."""
    event: Accepted | Completed | Failed | Feedback | None
    reason: str | None


def parse_event(text: str | bytes) -> Accepted | Completed | Failed | Feedback:
    """The event in one line.

    Raises:
        SourceError: it is no event, or one that a newer Millrace wrote.
    """
    try:
        found = from_json(text, allow_inf_nan=True)
    except ValueError as error:
        raise SourceError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise SourceError(f"not an event: a JSON object is expected, found {type(found).__name__}")
    version = found.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise SourceError(f"written by a newer Millrace (event format {version}, this one reads {FORMAT}); upgrade")
    try:
        event = _EVENT.validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SourceError(f"not an event: {field + ': ' if field else ''}{first['msg']}") from None
    if event.occurred_at is None:
        raise SourceError("not an event: occurred_at is missing")
    return event


def now() -> datetime:
    return datetime.now(UTC)


class EventLog:
    """The segments of one process in `folder`. Thread-safe. `clock` says the time that events are stamped with.

    A segment that could not be written or synced cleanly is left behind, and a new one begun.
    """

    def __init__(self, folder: Path, instance: str | None = None, clock: Callable[[], datetime] = now) -> None:
        self._folder = folder
        self._instance = instance or f"{os.getpid()}-{secrets.token_hex(4)}"
        self._clock = clock
        self._writing = threading.Lock()
        self._segment: _Segment | None = None
        self._begun = 0
        self._last = datetime.min.replace(tzinfo=UTC)
        self._pool = ThreadPoolExecutor(_APPENDING_AT_ONCE, thread_name_prefix="event-log")

    def append(self, event: AnyRecord) -> AnyRecord:
        """`event` with the time at which it was written; returns once it is on disk. Threads share one fsync.

        Raises:
            SourceError: the disk did not take it; nothing of it may be acknowledged.
        """
        body = event.model_dump_json(exclude={"occurred_at"})
        try:
            with self._writing:
                # Under the lock, so that times grow along a segment and belong to its hour.
                at = self._last = max(self._clock(), self._last)
                segment = self._current(at)
                end = segment.write(f'{body[:-1]},"occurred_at":"{at.isoformat()}"}}\n'.encode())
            segment.sync(end)
        except OSError as error:
            raise SourceError(
                f"the event log in {self._folder} can't be written: {error.strerror}; free space on its disk"
            ) from None
        return event.model_copy(update={"occurred_at": at})

    async def append_async(self, event: AnyRecord) -> AnyRecord:
        """`append`, without blocking the event loop. Cancelled or not, the event is written."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.append, event)

    def close(self) -> None:
        """Sync and close the segment; a later append begins a new one."""
        self._pool.shutdown(wait=True)
        with self._writing:
            if self._segment is not None:
                self._segment.close()
                self._segment = None

    def _current(self, at: datetime) -> "_Segment":
        hour = at.replace(minute=0, second=0, microsecond=0)
        if self._segment is not None and (self._segment.damaged or self._segment.hour != hour):
            left, self._segment = self._segment, None
            left.close()
        if self._segment is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"{hour:%Y-%m-%dT%H}-{self._instance}-{self._begun}.jsonl"
            self._begun += 1  # first: a file that could only half be begun is there, and its name is taken
            self._segment = _Segment(self._folder / name, hour)
        return self._segment


class _Segment:
    """One open file of one process. `write` is called under the log's lock, `sync` by any thread."""

    def __init__(self, path: Path, hour: datetime) -> None:
        self.hour = hour
        self.damaged = False
        self._written = 0
        self._synced = 0
        self._syncing = threading.Lock()
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.fsync(folder)  # or the file's name is lost with the power, and its lines with it
            except OSError:
                os.close(self._descriptor)
                raise
        finally:
            os.close(folder)

    def write(self, line: bytes) -> int:
        """Length of the segment with `line`. A line that fits only in part is taken back whole."""
        done = 0
        try:
            while done < len(line):
                done += os.write(self._descriptor, line[done:])
        except OSError:
            self._take_back()
            raise
        self._written += len(line)
        return self._written

    def sync(self, end: int) -> None:
        """Return once the first `end` bytes are on disk: whoever comes first syncs for all who wrote before."""
        with self._syncing:
            if self._synced >= end:
                return
            if self.damaged:
                raise OSError(errno.EIO, "an earlier sync failed")
            written = self._written
            try:
                os.fsync(self._descriptor)
            except OSError:
                self.damaged = True  # the kernel may have dropped the pages: a second sync would lie
                raise
            self._synced = written

    def close(self) -> None:
        try:
            if not self.damaged:
                self.sync(self._written)
        finally:
            with self._syncing:
                os.close(self._descriptor)

    def _take_back(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._written)
        except OSError:
            self.damaged = True


def read_events(folder: Path, start: datetime, end: datetime) -> Iterator[Line]:
    """Lines written in [start, end), segment by segment, in the order in which they were written.

    A last line without its newline is still being written, or was never acknowledged: it is no event yet.

    Raises:
        SourceError: a segment can't be read.
    """
    for path in sorted(folder.glob("*.jsonl")):
        hour = segment_hour(path)
        if hour is None or hour >= end or hour + HOUR <= start:
            continue
        try:
            for line in _lines(path, hour):
                if start <= line.at < end:
                    yield line
        except OSError as error:
            raise SourceError(f"segment {path} can't be read: {error.strerror}; restore it and run again") from None


def erase_lines(folder: Path, erased: Callable[[Line], bool]) -> int:
    """Overwrite the lines for which `erased` is true with blanks, where they are: a gateway may be writing to the same
    segment, and what is said of other lines names their offset. How many lines those were; safe to repeat.

    Raises:
        SourceError: a segment can't be read or written.
    """
    done = 0
    for path in sorted(folder.glob("*.jsonl")):
        hour = segment_hour(path)
        if hour is None:
            continue
        try:
            _finish_blanks(path)
            doomed = [line for line in _lines(path, hour) if erased(line)]
            if doomed:
                _overwrite(path, [line.offset for line in doomed])
        except OSError as error:
            raise SourceError(
                f"segment {path} can't be erased from: {error.strerror}; correct that and retry"
            ) from None
        done += len(doomed)
    return done


def is_erased(line: str | bytes) -> bool:
    """Whether a line of a segment was overwritten, or is being: no event begins with a blank."""
    return line[:1] in (" ", b" ")


def _overwrite(path: Path, offsets: Iterable[int]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        # The first byte of each first, on disk: whoever is killed in the middle leaves no half line that counts as one.
        for offset in offsets:
            os.pwrite(descriptor, b" ", offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _finish_blanks(path)


def _finish_blanks(path: Path) -> None:
    """Blank the rest of every line that begins with one."""
    with path.open("r+b") as file:
        offset = 0
        for raw in iter(file.readline, b""):
            if is_erased(raw) and raw.strip():
                os.pwrite(file.fileno(), b" " * len(raw.rstrip(b"\n")), offset)
            offset += len(raw)
        os.fsync(file.fileno())


def _lines(path: Path, hour: datetime) -> Iterator[Line]:
    offset, at = 0, hour
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            if not is_erased(raw):
                line = _line(path.name, offset, raw[:-1], at, hour)
                at = max(at, line.at)
                yield line
            offset += len(raw)


def _line(segment: str, offset: int, raw: bytes, before: datetime, hour: datetime) -> Line:
    text = raw.decode(errors="backslashreplace")
    try:
        event = parse_event(raw)
        assert event.occurred_at is not None
        if not hour <= event.occurred_at < hour + HOUR:
            raise SourceError(f"occurred_at {event.occurred_at.isoformat()} is outside the hour of its segment")
    except SourceError as error:
        return Line(segment, offset, text, before, None, str(error))
    return Line(segment, offset, text, event.occurred_at, event, None)


def segment_hour(path: Path) -> datetime | None:
    """The hour whose events a segment holds; None: the file is no segment."""
    try:
        return datetime.strptime(path.name[:13], "%Y-%m-%dT%H").replace(tzinfo=UTC)
    except ValueError:
        return None
