"""Which chunk answers a question, as far as one can tell, and what is left out."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.retrieval.search import Hit
from millrace.scoring.duplicates import near_duplicates
from millrace.sources.questions import Question
from millrace.training.pairs import Corpus, Pair, Sought, choose_pairs, seek

TEXTS = {
    "granite": "Granite is a rock that cools slowly, deep under the ground, so that its crystals grow large.",
    "basalt": "Basalt is a rock that cools quickly, at the surface, so that its crystals stay small.",
    "bread": "Bread rises because yeast turns sugar into gas, which the dough holds back in small bubbles.",
    "tides": "The tides follow the moon, whose gravity pulls the water of the sea towards it.",
}


def chunks(texts: dict[str, str] = TEXTS) -> pa.Table:
    rows = [
        {"chunk_id": name, "content_hash": name, "document_id": f"document of {name}", "position": 0, "source": "s",
         "uri": "u", "section": None, "title": name, "text": text}
        for name, text in texts.items()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SILVER_CHUNKS.rows_schema)


def feedback(*rows: dict[str, Any]) -> pa.Table:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    base = {"content_hash": "h", "events_seen": 1, "date": start.date(), "user": "u", "simulated": False,
            "comment": None, "correction": None, "release_id": "r", "release_version": "1",
            "index_build": "b"}  # fmt: skip
    return pa.Table.from_pylist(
        [
            base | {"completion_id": str(i), "occurred_at": start + timedelta(minutes=i)} | row
            for i, row in enumerate(rows)
        ],
        schema=SILVER_FEEDBACK.rows_schema,
    )


def exchanges(*cited: list[str]) -> pa.Table:
    rows = [{"completion_id": str(i), "citations": ids} for i, ids in enumerate(cited)]
    return pa.Table.from_pylist(
        rows, schema=pa.schema([SILVER_EXCHANGES.schema.field(name) for name in ("completion_id", "citations")])
    )


def all_found(question: str, k: int) -> list[Hit]:
    """Every chunk, in one order."""
    return [Hit(name, f"document of {name}", name, text, "u", 1.0) for name, text in TEXTS.items()][:k]


def paired(*sought: Sought, held_out: tuple[str, ...] = (), size: int = 100) -> tuple[list[Pair], dict[str, int]]:
    return choose_pairs(sought, Corpus(chunks()), held_out, all_found, size)


def test_a_documents_question_goes_with_the_chunk_of_its_document_that_holds_the_answer() -> None:
    derived = [
        Question("q1", "How does granite cool?", "It cools slowly.", "document of granite", "rocks", "training"),
        Question("q2", "What does the moon pull?", "The water of the sea.", "document of tides", "sea", "evaluation"),
        Question("q3", "How does basalt cool?", "In a thermos flask.", "document of basalt", "rocks", "training"),
    ]
    pairs, left_out = paired(*seek(derived, feedback(), exchanges()))
    (pair,) = pairs
    assert (pair.question, pair.chunk_id, pair.negative_id) == ("How does granite cool?", "granite", "basalt")
    assert left_out == {"no chunk is known to hold the answer": 1}


def test_of_what_users_rated_the_cited_chunk_that_holds_the_answer_is_taken() -> None:
    rated = feedback(
        {"rating": 1.0, "question": "Why does it rise?", "answer": "Yeast turns sugar into gas."},
        {"rating": 0.2, "question": "Why do tides come?", "answer": "They follow the moon."},
        {"rating": 1.0, "question": "What cools quickly?", "answer": "Basalt cools quickly."},
        {"rating": 1.0, "question": "And what else?", "answer": "Gravity pulls the water."},
        {"rating": 1.0, "question": "Cited nothing?", "answer": "Gravity pulls the water."},
    )
    sought = seek([], rated, exchanges(["tides", "bread"], ["tides"], ["a chunk that is gone"], ["granite"], []))
    assert {one.question for one in sought} == {"Why does it rise?", "What cools quickly?", "And what else?"}
    pairs, left_out = paired(*sought)
    assert [(pair.question, pair.chunk_id, pair.origin) for pair in pairs] == [
        ("Why does it rise?", "bread", "citation")
    ]
    assert left_out == {"no chunk is known to hold the answer": 2}


def test_a_correction_goes_with_a_chunk_only_where_one_clearly_holds_it() -> None:
    said = feedback(
        {"rating": 0.0, "question": "What pulls water?", "answer": "Yeast.", "correction": "Gravity of the moon"},
        {"rating": 0.0, "question": "What cools?", "answer": "Bread.", "correction": "A rock"},
        {"rating": 0.9, "question": "Does bread rise?", "answer": "No.", "correction": "Yeast turns sugar into gas"},
    )
    sought = [one for one in seek([], said, exchanges([], [], [])) if one.origin == "correction"]
    pairs, left_out = paired(*sought)
    assert [(pair.question, pair.chunk_id) for pair in pairs] == [("What pulls water?", "tides")]
    assert left_out == {"no chunk is known to hold the answer": 1}, "two rocks cool"


def test_nothing_near_an_evaluation_question_is_learnt() -> None:
    sought = [
        Sought(f"How does {name} do it?", text, "document", False, f"document of {name}")
        for name, text in TEXTS.items()
    ]
    held_out = ["how does GRANITE do it"]
    pairs, left_out = paired(*sought, held_out=tuple(held_out))
    assert {pair.chunk_id for pair in pairs} == {"basalt", "bread", "tides"}
    assert not near_duplicates([pair.question for pair in pairs], held_out)
    assert left_out == {"nearly an evaluation question": 1}


def test_a_document_is_on_one_side_and_what_users_said_comes_first() -> None:
    sought = [
        Sought(f"{word} {name}?", TEXTS[name], "document", False, f"document of {name}")
        for name in TEXTS
        for word in ("What is", "Explain", "Why")
    ]
    pairs, _ = paired(*sought)
    sides = {pair.chunk_id: {one.held_out for one in pairs if one.chunk_id == pair.chunk_id} for pair in pairs}
    assert len(pairs) == 12
    assert all(len(side) == 1 for side in sides.values())
    said = feedback({"rating": 1.0, "question": "Why does it rise?", "answer": "Yeast turns sugar into gas."})
    derived = [Question("q", "How does granite cool?", "Slowly.", "document of granite", "rocks", "training")]
    (first,), _ = paired(*seek(derived, said, exchanges(["bread"])), size=1)
    assert first.origin == "citation"


@pytest.mark.parametrize("rating", [0.5, 1.0])
def test_a_negative_is_never_of_the_same_document(rating: float) -> None:
    said = feedback({"rating": rating, "question": "Which rock?", "answer": TEXTS["granite"]})
    (pair,), _ = paired(*seek([], said, exchanges(["granite"])))
    assert (pair.chunk_id, pair.negative_id) == ("granite", "basalt")
