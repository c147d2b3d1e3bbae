"""What a worker does with record batches of questions, with a generator that is exact."""

import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from millrace.applications import Application, Generation, Prices
from millrace.batch import answering
from millrace.batch.answering import AT_ONCE, Pinned, answer_questions, answer_rows
from millrace.batch.slices import said
from millrace.engines.engine import Generated
from millrace.errors import BatchError, EngineError, RetrievalError
from millrace.lakehouse.tables import GOLD_ANSWERS
from tests.serving.parrot import Drawer, Parrot, a_release


@pytest.fixture
def pinned(qa: Application, tmp_path: Path) -> Pinned:
    priced = qa.model_copy(update={"prices": Prices(prompt_million_tokens=1e6, completion_million_tokens=10e6)})
    return Pinned(
        application=priced,
        release_id="rel-1",
        version="1",
        generator="parrot.gguf",
        index_build="build-1",
        folder=tmp_path,
        config={},
        registry={},
    )


def asked(*questions: str) -> list[dict[str, str]]:
    return [{"question_id": f"q{number}", "question": question} for number, question in enumerate(questions)]


class Choosy(Parrot):
    """Refuses questions that say so; with `broken`, all."""

    broken = False

    def generate(self, messages, config: Generation) -> Generated:  # type: ignore[no-untyped-def]
        if self.broken or "refuse" in messages[-1].content:
            raise EngineError("the request was refused")
        return super().generate(messages, config)


class Counting(Parrot):
    """Knows how many are asking at once."""

    now = most = 0
    lock = threading.Lock()

    def generate(self, messages, config: Generation) -> Generated:  # type: ignore[no-untyped-def]
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        with self.lock:
            self.now -= 1
        return super().generate(messages, config)


def test_every_question_has_its_answer_with_citations_tokens_and_cost_in_order(pinned: Pinned) -> None:
    rows = answer_rows(a_release(Parrot(), Drawer()), pinned, asked("one", "two words"), "batch")
    assert [(row["question_id"], row["answer"]) for row in rows] == [
        ("q0", "you asked one"),
        ("q1", "you asked two words"),
    ]
    first = rows[0]
    assert first["citations"] == ["chunk-1"]
    assert (first["release_id"], first["index_build"], first["mode"]) == ("rel-1", "build-1", "batch")
    assert first["cost_usd"] == first["prompt_tokens"] + 10 * first["completion_tokens"]
    assert pa.Table.from_pylist(rows, schema=GOLD_ANSWERS.rows_schema).num_rows == 2


def test_questions_are_answered_several_at_once(pinned: Pinned) -> None:
    engine = Counting()
    answer_rows(a_release(engine, Drawer()), pinned, asked(*(str(number) for number in range(3 * AT_ONCE))), "batch")
    assert engine.most == AT_ONCE


def test_a_question_that_can_not_be_answered_is_a_row_with_its_error(pinned: Pinned) -> None:
    rows = answer_rows(a_release(Choosy(), Drawer()), pinned, asked("refuse me", " ", "x" * 5000, "fine"), "batch")
    assert [row["answer"] for row in rows] == [None, None, None, "you asked fine"]
    assert [row["error"] and str(row["error"])[:25] for row in rows] == [
        "the request was refused",
        "the question is empty; as",
        "the question has 5000 cha",
        None,
    ]
    assert {row["cost_usd"] for row in rows[:3]} == {0.0}


def test_what_an_outage_left_unanswered_is_asked_again_when_it_is_over(pinned: Pinned) -> None:
    class Restarting(Parrot):
        left = 2 * AT_ONCE
        lock = threading.Lock()

        def generate(self, messages, config: Generation) -> Generated:  # type: ignore[no-untyped-def]
            with self.lock:
                self.left -= 1
                if self.left > AT_ONCE:
                    raise EngineError("Connection refused")
            return super().generate(messages, config)

    rows = answer_rows(a_release(Restarting(), Drawer()), pinned, asked(*map(str, range(2 * AT_ONCE))), "batch")
    assert [row["answer"] for row in rows] == [f"you asked {number}" for number in range(2 * AT_ONCE)]
    assert not any(row["error"] for row in rows)


def test_a_release_that_answers_nothing_fails_instead_of_calling_every_question_bad(pinned: Pinned) -> None:
    engine = Choosy()
    engine.broken = True
    with pytest.raises(BatchError, match="release qa@1 answers nothing: the request was refused"):
        answer_rows(a_release(engine, Drawer()), pinned, asked("one", "two"), "batch")


def test_an_index_that_is_gone_fails_the_slice_and_is_no_answer(pinned: Pinned) -> None:
    class Gone(Drawer):
        def search(self, question: str, k: int, build: str | None = None) -> list[object]:  # type: ignore[override]
            raise RetrievalError("the Qdrant server does not answer")

    with pytest.raises(RetrievalError):
        answer_rows(a_release(Parrot(), Gone()), pinned, asked("one"), "batch")


def test_a_process_opens_a_release_once_and_closes_it_for_another(
    pinned: Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Parrot] = []

    def open_pipeline(folder: Path, config: object) -> object:
        opened.append(Parrot())
        return a_release(opened[-1], Drawer())

    monkeypatch.setattr(answering, "open_pipeline", open_pipeline)
    monkeypatch.setattr(answering, "_kept", [])
    batch = pa.RecordBatch.from_pylist(asked("one"))
    assert list(answer_questions(iter([]), pinned, "batch")) == []
    assert not opened, "without a question nothing is loaded"
    for _ in range(2):
        answers = [b.num_rows for b in answer_questions(iter([batch, batch]), pinned, "batch")]
        assert answers == [1, 1]
    assert len(opened) == 1
    other = Pinned(**{**vars(pinned), "index_build": "build-2"})
    list(answer_questions(iter([batch]), other, "batch"))
    assert [engine.closed for engine in opened] == [True, False]


@pytest.mark.parametrize(
    ("sentence", "ours"),
    [
        ("BatchError: release qa@1 answers nothing: x", "release qa@1 answers nothing: x"),
        ("the disk is full: 3 MB", "the disk is full: 3 MB"),
        ("[DELTA_X] Table: gone", "[DELTA_X] Table: gone"),
    ],
)
def test_what_a_worker_said_is_one_sentence_of_ours(sentence: str, ours: str) -> None:
    assert str(said(sentence)) == ours


def test_what_travels_does_not_show_its_keys(pinned: Pinned) -> None:
    assert "secret" not in repr(Pinned(**{**vars(pinned), "config": {"qdrant_api_key": "secret"}}))
