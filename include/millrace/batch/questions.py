"""Questions in, from a file that a person has; and how far releases are with them.

A submission is whole or refused. The id of a question is the caller's, or made of its text; an id that is known with
the same text is the same question, with another text a mistake. Nothing is asked here.
"""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from millrace.applications import Application
from millrace.errors import BatchError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_QUESTIONS, GOLD_ANSWERS
from millrace.settings import Settings

SHOWN = 3
"""Bad lines that a refusal names."""

Word = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]


class Line(BaseModel):
    """One line of a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = Field(min_length=1, pattern=r"\S")
    question_id: Word | None = None
    """None: a hash of the question."""
    asked_at: Annotated[AwareDatetime | None, Field(strict=False)] = None
    """None: now."""

    @property
    def id(self) -> str:
        return self.question_id or f"q-{content_hash(self.question)[:16]}"


@dataclass(frozen=True)
class Progress:
    """One batch and one release."""

    batch: str
    release_version: str
    """Empty: no release has answered any of it."""
    questions: int
    answered: int
    errors: int
    """Questions whose answer is an error."""

    @property
    def waiting(self) -> int:
        return self.questions - self.answered - self.errors


def submit_questions(
    settings: Settings,
    application: Application,
    path: Path,
    *,
    run: str,
    batch: str | None = None,
    simulated: bool = False,
) -> dict[str, Any]:
    """Put the questions of a file into `bronze/questions`; those that are there already stay as they are.

    Args:
        path: `.jsonl`, an object a line, or `.csv` with a header: `question`, and optionally `question_id` and
            `asked_at` (ISO 8601 with a zone).
        run: who submits.
        batch: name to find them by; None: the file's name.
        simulated: a program made them up.

    Returns:
        `batch`, `submitted` (new), `known`, `changed`.

    Raises:
        BatchError: a line can't be used, or an id stands for two questions, here or in the table. Nothing is written.
    """
    lines = read_questions(path)
    lake = Lake.of(settings, application.name)
    batch = (path.stem if batch is None else batch).strip()
    if not batch:
        raise BatchError("a batch needs a name to find it by; name it with --batch")
    _refuse_other_texts(lake, lines)
    now = datetime.now(UTC)
    rows = [
        {
            "question_id": line.id,
            "question": line.question,
            "batch": batch,
            "simulated": simulated,
            "asked_at": line.asked_at or now,
        }
        for line in lines
    ]
    table = pa.Table.from_pylist(rows, schema=BRONZE_QUESTIONS.rows_schema)
    written = lake.merge(BRONZE_QUESTIONS, table, run=run)
    known = len(lines) - written.inserted
    return {"batch": batch, "submitted": written.inserted, "known": known, "changed": written.changed}


def read_questions(path: Path) -> list[Line]:
    """The questions of a file, each once.

    Raises:
        BatchError: it can't be read, a line can't be used, or an id stands for two questions.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_lines}
    if path.suffix not in readers:
        raise BatchError(f"{path} is neither .jsonl nor .csv; questions come as one of these")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            read = list(readers[path.suffix](file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BatchError(f"{path} can't be read: {error}; questions come as UTF-8 text") from None
    bad = [f"line {number} {line}" for number, line in read if isinstance(line, str)]
    lines: dict[str, Line] = {}
    for number, line in read:
        if isinstance(line, str):
            continue
        first = lines.setdefault(line.id, line)
        if first.question != line.question:
            bad.append(f"line {number} has id {line.id!r}, which another question in the file has too")
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise BatchError(
            f"{path}: {len(bad)} of {len(read)} lines can't be used, nothing was submitted: "
            f"{'; '.join(bad[:SHOWN])}{more}; correct them and submit the file again"
        )
    if not lines:
        raise BatchError(f"{path} holds no question; nothing was submitted")
    return list(lines.values())


def batch_progress(settings: Settings, application: Application) -> list[Progress]:
    """How far each release is with each batch, batches in order of their names, releases in order of their versions."""
    lake = Lake.of(settings, application.name)
    asked = lake.read(BRONZE_QUESTIONS, ["question_id", "batch"])
    batch_of = dict(zip(asked["question_id"].to_pylist(), asked["batch"].to_pylist(), strict=True))
    sizes = Counter(batch_of.values())
    counts: defaultdict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
    answers = lake.read(GOLD_ANSWERS, ["question_id", "release_version", "error"])
    for question_id, version, error in zip(*(column.to_pylist() for column in answers.columns), strict=True):
        if question_id in batch_of:
            counts[batch_of[question_id], version][error is not None] += 1
    untouched = sizes.keys() - {batch for batch, _ in counts}
    keys = sorted([*counts, *((batch, "") for batch in untouched)], key=lambda key: (key[0], len(key[1]), key[1]))
    return [
        Progress(batch, version, sizes[batch], counts[batch, version][False], counts[batch, version][True])
        for batch, version in keys
    ]


def _refuse_other_texts(lake: Lake, lines: list[Line]) -> None:
    ids = pa.array([line.id for line in lines], pa.string())
    there = lake.read(BRONZE_QUESTIONS, ["question_id", "question"], where=pc.field("question_id").isin(ids))
    known = dict(zip(there["question_id"].to_pylist(), there["question"].to_pylist(), strict=True))
    other = [line for line in lines if known.get(line.id, line.question) != line.question]
    if other:
        told = "; ".join(
            f"{line.id}: {known[line.id]!r} is known, {line.question!r} was submitted" for line in other[:SHOWN]
        )
        more = f"; and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        raise BatchError(
            f"{len(other)} ids stand for other questions in {BRONZE_QUESTIONS.path} already, nothing was submitted: "
            f"{told}{more}; give new questions ids of their own"
        )


def _json_lines(file: Any) -> Iterator[tuple[int, Line | str]]:
    for number, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            found = json.loads(text)
        except ValueError as error:
            yield number, f"is not JSON ({error})"
            continue
        yield number, _line(found)


def _csv_lines(file: Any) -> Iterator[tuple[int, Line | str]]:
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        if None in row or None in row.values():
            yield reader.line_num, f"has not the {len(reader.fieldnames or ())} columns of the header"
            continue
        yield reader.line_num, _line({name: value for name, value in row.items() if value or name == "question"})


def _line(found: Any) -> Line | str:
    """The line, or what is wrong with it."""
    try:
        return Line.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where + ': ' if where else ''}{first['msg']}"
