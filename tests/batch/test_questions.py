"""What comes in from a file, and what of it is where."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from millrace.applications import Application
from millrace.batch.questions import batch_progress, read_questions, submit_questions
from millrace.cli import app
from millrace.errors import BatchError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_QUESTIONS, GOLD_ANSWERS
from millrace.settings import Settings


def a_file(folder: Path, text: str, name: str = "helpdesk.jsonl") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def texts(lake: Lake) -> dict[str, str]:
    return {row["question_id"]: row["question"] for row in lake.read(BRONZE_QUESTIONS).to_pylist()}


def answered(lake: Lake, version: str, **errors: str | None) -> None:
    """Answers of a release: question id → error."""
    rows = [
        dict.fromkeys(GOLD_ANSWERS.rows_schema.names)
        | {"question_id": name, "release_id": f"rel-{version}", "release_version": version, "index_build": "b"}
        | {"question": "?", "citations": [], "prompt_tokens": 0, "completion_tokens": 0}
        | {"seconds": 0.0, "cost_usd": 0.0, "error": error, "mode": "batch"}
        for name, error in errors.items()
    ]
    lake.merge(GOLD_ANSWERS, pa.Table.from_pylist(rows, schema=GOLD_ANSWERS.rows_schema), run="test")


def test_a_file_submitted_twice_is_in_the_table_once(
    settings: Settings, qa: Application, lake: Lake, tmp_path: Path
) -> None:
    path = a_file(
        tmp_path,
        lines(
            {"question_id": "a", "question": "What is parallelism?"},
            {"question": "What is the DAG folder?", "asked_at": "2026-11-24T09:00:00+01:00"},
            {"question_id": "a", "question": "What is parallelism?"},
        ),
    )
    first = submit_questions(settings, qa, path, run="test", simulated=True)
    assert first == {"batch": "helpdesk", "submitted": 2, "known": 0, "changed": True}
    version = lake.version(BRONZE_QUESTIONS)
    assert submit_questions(settings, qa, path, run="again", batch="other")["changed"] is False
    assert lake.version(BRONZE_QUESTIONS) == version
    rows = sorted(lake.read(BRONZE_QUESTIONS).to_pylist(), key=lambda row: row["question_id"])
    assert [(row["question"], row["batch"], row["simulated"]) for row in rows] == [
        ("What is parallelism?", "helpdesk", True),
        ("What is the DAG folder?", "helpdesk", True),
    ]
    assert rows[1]["question_id"].startswith("q-")
    assert rows[1]["asked_at"].isoformat() == "2026-11-24T08:00:00+00:00"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"question": "a"}\n{"question": "b"', "1 of 2 lines can't be used, .*: line 2 is not JSON"),
        ("a.jsonl", '{"question": "a"}\n[1]', "line 2 Input should be a valid dictionary"),
        ("a.jsonl", '{"question": "a"}\n{"text": "b"}', "line 2 question: Field required"),
        ("a.jsonl", '{"question": "a", "asked": 1}', "line 1 asked: Extra inputs are not permitted"),
        ("a.jsonl", '{"question": " "}', "line 1 question: "),
        ("a.jsonl", '{"question": 3}', "line 1 question: Input should be a valid string"),
        ("a.jsonl", '{"question": "a", "asked_at": "2026-11-24T09:00:00"}', "line 1 asked_at: .*timezone"),
        ("a.jsonl", '{"question_id": "x", "question": "a"}\n{"question_id": "x", "question": "b"}',
         "line 2 has id 'x', which another question in the file has too"),
        ("a.jsonl", "no\n" * 5, "5 of 5 lines .*; and 2 more; correct them"),
        ("a.jsonl", "\n\n", "holds no question"),
        ("a.csv", "question_id,question\n1,a,b\n", "line 2 has not the 2 columns of the header"),
        ("a.csv", "question_id,question\n1\n", "line 2 has not the 2 columns of the header"),
        ("a.csv", "question\n\"a", "can't be read"),
        ("a.csv", "id,question\n1,a\n", "line 2 id: Extra inputs"),
        ("a.txt", "What?", "neither .jsonl nor .csv"),
    ],
)  # fmt: skip
def test_a_file_with_a_bad_line_is_refused_whole_and_the_line_is_named(
    settings: Settings, qa: Application, lake: Lake, tmp_path: Path, name: str, text: str, said: str
) -> None:
    with pytest.raises(BatchError, match=said):
        submit_questions(settings, qa, a_file(tmp_path, text, name), run="test")
    assert not lake.exists(BRONZE_QUESTIONS)


def test_files_that_are_not_there_or_not_text_are_said(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=r"nowhere\.csv can't be read"):
        read_questions(tmp_path / "nowhere.csv")
    (tmp_path / "a.csv").write_bytes(b"question\n\xff\xfe\n")
    with pytest.raises(BatchError, match=r"a\.csv can't be read.*UTF-8"):
        read_questions(tmp_path / "a.csv")


def test_an_id_that_is_known_with_another_text_is_refused_and_nothing_is_written(
    settings: Settings, qa: Application, lake: Lake, tmp_path: Path
) -> None:
    submit_questions(settings, qa, a_file(tmp_path, "question_id,question\n1,What?\n", "a.csv"), run="test")
    changed = a_file(tmp_path, "question_id,question\n1,Why?\n2,Where?\n", "b.csv")
    with pytest.raises(BatchError, match=r"1: 'What\?' is known, 'Why\?' was submitted; give new questions ids"):
        submit_questions(settings, qa, changed, run="test")
    assert texts(lake) == {"1": "What?"}


@pytest.mark.slow
@given(st.lists(st.text(min_size=1, max_size=30).filter(lambda text: text.strip() and text.isprintable()), min_size=1))
def test_both_formats_hold_the_same_questions_and_ids_follow_from_the_text(
    tmp_path_factory: pytest.TempPathFactory, questions: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    (folder / "a.jsonl").write_text(lines(*({"question": question} for question in questions)))
    quoted = ['"' + question.replace('"', '""') + '"' for question in questions]
    (folder / "a.csv").write_text("\n".join(["question", *quoted]), encoding="utf-8")
    read = [read_questions(folder / name) for name in ("a.jsonl", "a.csv")]
    assert [line.id for line in read[0]] == [line.id for line in read[1]]
    assert [line.question for line in read[0]] == list(dict.fromkeys(questions))
    assert len({line.id for line in read[0]}) == len(read[0])


def test_progress_is_told_by_batch_and_release(settings: Settings, qa: Application, lake: Lake, tmp_path: Path) -> None:
    assert batch_progress(settings, qa) == []
    rows = "".join(f"{number},Question {number}?\n" for number in range(3))
    submit_questions(settings, qa, a_file(tmp_path, f"question_id,question\n{rows}", "first.csv"), run="test")
    submit_questions(settings, qa, a_file(tmp_path, "question_id,question\n9,What?\n", "second.csv"), run="test")
    answered(lake, "2", **{"0": None, "1": "too long"})
    answered(lake, "10", **{"0": None, "1": None, "2": None})
    found = [
        (one.batch, one.release_version, one.questions, one.answered, one.errors, one.waiting)
        for one in batch_progress(settings, qa)
    ]
    assert found == [("first", "2", 3, 1, 1, 1), ("first", "10", 3, 3, 0, 0), ("second", "", 1, 0, 0, 1)]


def test_a_person_submits_and_looks(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLRACE_HOME", str(settings.home))
    path = a_file(tmp_path, lines({"question": "What is parallelism?"}))
    submitted = CliRunner().invoke(app, ["batch", "submit", str(path), "--batch", "mine"])
    assert (submitted.exit_code, submitted.output) == (0, "mine: 1 new, 0 known.\n")
    told = CliRunner().invoke(app, ["batch", "status"])
    assert told.output == "mine  no release: 0 of 1 answered, 0 errors, 1 waiting\n"
    refused = CliRunner().invoke(app, ["batch", "submit", str(a_file(tmp_path, "no", "b.jsonl"))])
    assert refused.exit_code == 1
    assert "line 1 is not JSON" in refused.output
