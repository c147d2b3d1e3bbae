"""Where an application has something of one user: found, not touched.

A user is in events, exchanges and feedback by pseudonym. From there on by what was asked only: an example that was
made of a question or a correction names nobody, so it is found by the question, and by its hash once the question is
gone. Another user's example of the very same question is found with it; by the hash, unless others' feedback is on
that question. Reads everything, decides nothing.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from millrace.errors import SourceError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    BRONZE_EVENTS,
    GOLD_PREFERENCE_EXAMPLES,
    GOLD_TRAINING_EXAMPLES,
    QUARANTINE_FEEDBACK,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
    Table,
)
from millrace.settings import Settings
from millrace.sources.erased import Erasure, Questions, hashed, hashed_question
from millrace.sources.event_log import HOUR, Feedback, Line, parse_event, read_events, segment_hour

HOLDERS: tuple[tuple[Table, str], ...] = (
    # In the order of erasing: what is found by something comes before that.
    (GOLD_TRAINING_EXAMPLES, "example_id"),
    (GOLD_PREFERENCE_EXAMPLES, "example_id"),
    (SILVER_FEEDBACK, "completion_id"),  # found by what bronze says of who rated whose answer
    (BRONZE_EVENTS, "event_id"),
    (QUARANTINE_FEEDBACK, "item_id"),
    (SILVER_EXCHANGES, "completion_id"),
)
"""Table that may hold something of a user → the column that says which rows."""
WORK_FILES = ("examples.jsonl", "answers.jsonl", "pairs.jsonl")
"""What fine-tunes write of their examples, JSON with the `question` in each line, in a folder of each run."""


@dataclass(frozen=True)
class Found:
    """What there is of one user in one application."""

    erasure: Erasure
    """With all completions and hashes of questions that are known now."""
    lines: int
    """Of the event log."""
    rows: dict[str, frozenset[str]]
    """Path of a table → its rows, by the column in `HOLDERS`."""
    files: tuple[Path, ...]
    """Of fine-tunes, with a line that has one of the user's questions."""
    questions: Questions
    training_sets: frozenset[str]
    """The sets with such examples, and the names of fine-tunes whose files have them."""

    @property
    def nothing(self) -> bool:
        return not (self.lines or self.files or any(self.rows.values()))


def look(settings: Settings, application: str, erasure: Erasure) -> Found:
    """Everything that `erasure` is about.

    Raises:
        LakehouseError, SourceError: a table or a segment can't be read.
    """
    lake = Lake.of(settings, application)
    events, completions, said_on, questions = _events(lake, erasure)
    asked = lake.read(
        SILVER_EXCHANGES,
        ["completion_id", "question"],
        where=(pc.field("user") == erasure.user) & (pc.field("occurred_at") <= erasure.until),
    )
    completions |= set(asked["completion_id"].to_pylist())
    questions |= set(asked["question"].to_pylist())
    # Twice through the log: which lines are the user's is known once all their completions are.
    completions |= {
        line.event.completion_id
        for line in _logged(settings, application)
        if line.event is not None and not isinstance(line.event, Feedback) and erasure.covers(line.event)
    }
    erasure = replace(erasure, completions=erasure.completions | {hashed(one) for one in completions})
    feedback, of_others = _feedback(lake, erasure, said_on)
    questions |= set(feedback["question"].to_pylist())
    asked_for = _questions(settings, erasure, questions, of_others)
    kept = asked_for.hashes | set(erasure.told.get("questions", ()))
    erasure = replace(erasure, told=dict(erasure.told) | {"questions": sorted(kept)})
    examples = {
        table.path: _examples(lake, table, asked_for) for table in (GOLD_TRAINING_EXAMPLES, GOLD_PREFERENCE_EXAMPLES)
    }
    files = tuple(_files(settings, application, asked_for))
    rows = {
        **{path: frozenset(found["example_id"].to_pylist()) for path, found in examples.items()},
        BRONZE_EVENTS.path: frozenset(events | _said_on(lake, erasure)),
        QUARANTINE_FEEDBACK.path: frozenset(_quarantined(lake, erasure)),
        SILVER_FEEDBACK.path: frozenset(feedback["completion_id"].to_pylist()),
        SILVER_EXCHANGES.path: frozenset(asked["completion_id"].to_pylist()),
    }
    sets = {one for found in examples.values() for one in found["training_set"].to_pylist()}
    return Found(
        erasure,
        lines=sum(erasure.covers_line(line) for line in _logged(settings, application)),
        rows=rows,
        files=files,
        questions=asked_for,
        training_sets=frozenset(sets | {path.parent.name for path in files}),
    )


def mentions(line: str, questions: Questions) -> bool:
    """Whether a line of a fine-tune's file was made of one of the questions."""
    try:
        told = json.loads(line)
    except ValueError:  # torn, and of no use to anybody
        return any(json.dumps(question)[1:-1] in line for question in questions.texts)
    if "question" in told:
        return told["question"] in questions
    # Written before its lines had the question: a short one is in others' texts, too, so it must stand alone there.
    text = "\n".join(value for value in told.values() if isinstance(value, str))
    return any(re.search(rf"(?<!\w){re.escape(question)}(?!\w)", text) for question in questions.texts)


def _events(lake: Lake, erasure: Erasure) -> tuple[set[str], set[str], set[str], set[str]]:
    """Of bronze: events that name the user, their completions, those that the user rated, and what was asked."""
    named = pc.match_substring(pc.field("payload"), erasure.user)
    events, completions, said_on, questions = set[str](), set[str](), set[str](), set[str]()
    for row in lake.read(BRONZE_EVENTS, ["event_id", "payload"], where=named).to_pylist():
        event = parse_event(row["payload"])
        if not erasure.covers(event):
            continue
        events.add(row["event_id"])
        if isinstance(event, Feedback):
            said_on.add(event.completion_id)
        else:
            completions.add(event.completion_id)
            questions.add(event.question)
    return events, completions, said_on, questions


def _said_on(lake: Lake, erasure: Erasure) -> set[str]:
    """Events about the user's completions, whoever they name."""
    about = lake.read(BRONZE_EVENTS, ["event_id", "completion_id"]).to_pylist()
    return {row["event_id"] for row in about if hashed(row["completion_id"]) in erasure.completions}


def _questions(settings: Settings, erasure: Erasure, texts: set[str], of_others: set[str]) -> Questions:
    """Those of `texts`, and those that earlier looks found, less what by now only others are known to have asked."""
    key = settings.pseudonym_key.get_secret_value().encode()
    texts = {text.strip() for text in texts} - {""}
    earlier = set(erasure.told.get("questions", ())) - {hashed_question(key, one) for one in of_others}
    found = {hashed_question(key, one) for one in texts} if key else set[str]()
    return Questions(frozenset(texts), frozenset(earlier | found), key)


def _feedback(lake: Lake, erasure: Erasure, said_on: set[str]) -> tuple[pa.Table, set[str]]:
    """Rows on the user's completions, and those that the user's ratings of other answers made; what others' are on."""
    rows = lake.read(SILVER_FEEDBACK, ["completion_id", "question"])
    ours = [hashed(one) in erasure.completions or one in said_on for one in rows["completion_id"].to_pylist()]
    mask = pa.array(ours, pa.bool_())
    return rows.filter(mask), set(rows.filter(pc.invert(mask))["question"].to_pylist())


def _quarantined(lake: Lake, erasure: Erasure) -> Iterator[str]:
    for row in lake.read(QUARANTINE_FEEDBACK, ["item_id", "payload", "found_in"]).to_pylist():
        try:
            theirs = erasure.covers(parse_event(row["payload"]))
        except SourceError:
            theirs = erasure.user in row["payload"] and row["found_in"] <= erasure.until
        if theirs:
            yield row["item_id"]


def _examples(lake: Lake, table: Table, questions: Questions) -> pa.Table:
    """Rows that were made of what users asked and said, with one of these questions."""
    rows = lake.read(table, ["training_set", "example_id", "question"], where=pc.field("origin") != "document")
    return rows.filter(pa.array([one in questions for one in rows["question"].to_pylist()], pa.bool_()))


def _files(settings: Settings, application: str, questions: Questions) -> Iterator[Path]:
    runs = settings.home / "training" / settings.environment / application
    for name in WORK_FILES:
        for path in sorted(runs.glob(f"*/{name}")):
            lines = path.read_text(encoding="utf-8").splitlines()
            if any(mentions(line, questions) for line in lines):
                yield path


def _logged(settings: Settings, application: str) -> Iterator[Line]:
    folder = settings.event_log(application)
    hours = [hour for path in folder.glob("*.jsonl") if (hour := segment_hour(path))]
    if hours:
        yield from read_events(folder, min(hours), max(hours) + HOUR)
