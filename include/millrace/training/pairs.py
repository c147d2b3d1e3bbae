"""Pairs of a question and the chunk that answers it, with a chunk that was found in its place: what an embedding model
learns from. Nothing that the gate will ask. Knows nothing of how it is trained on.

Where the answer is is judged by its words, each weighted by how rare it is among the chunks (Spärck Jones, 1972,
doi:10.1108/eb026526). A question whose chunk can't be told is left out: a wrong chunk teaches worse than none.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from millrace.lakehouse.content import content_hash
from millrace.releases.pipeline import MAX_QUESTION
from millrace.retrieval.embed import embedded_text
from millrace.retrieval.search import Hit
from millrace.scoring.overlap import normalised_words
from millrace.sources.questions import Question
from millrace.training.pool import LOW_RATING, corrections
from millrace.training.sets import refuse_near, take

HOLDS = 0.6
"""Share of an answer's words that a chunk must have to hold it."""
CLEARLY = 0.1
"""By how much a chunk must have more of question and correction than the next one, where nobody said which it is."""
HELD_OUT = 5
"""One document in so many is kept for measuring, with all that is asked of it."""
NEIGHBOURS = 8
"""Chunks among which the hard negative is looked for."""


@dataclass(frozen=True)
class Sought:
    """A question, and what is known of where its answer is."""

    question: str
    answer: str
    origin: Literal["document", "citation", "correction"]
    simulated: bool
    document_id: str | None = None
    """The document that holds the answer."""
    cited: tuple[str, ...] = ()
    """The chunks that the answer was given from, best first."""

    @property
    def example_id(self) -> str:
        return content_hash(self.question, self.answer, self.origin)


@dataclass(frozen=True)
class Pair:
    """A question, its chunk, and one that was found for it and is of another document."""

    question: str
    origin: str
    simulated: bool
    chunk_id: str
    negative_id: str
    held_out: bool
    """For measuring, never for training."""


@dataclass(frozen=True)
class Chunk:
    """One chunk, as it is embedded."""

    chunk_id: str
    document_id: str
    text: str


class Corpus:
    """All chunks, and which of them has which words."""

    def __init__(self, chunks: pa.Table) -> None:
        self.chunks = [
            Chunk(row["chunk_id"], row["document_id"], embedded_text(row["title"], row["text"]))
            for row in chunks.sort_by([("document_id", "ascending"), ("position", "ascending")]).to_pylist()
        ]
        self.by_id = {chunk.chunk_id: chunk for chunk in self.chunks}
        self._having: dict[str, list[int]] = defaultdict(list)
        for position, chunk in enumerate(self.chunks):
            for word in set(normalised_words(chunk.text)):
                self._having[word].append(position)

    def shares(self, text: str) -> dict[int, float]:
        """Position of a chunk → share of the words of `text` that it has, rare words counting more."""
        words = set(normalised_words(text))
        weight = {word: math.log1p(len(self.chunks) / max(len(self._having.get(word, ())), 1)) for word in words}
        total = sum(weight.values())
        found: dict[int, float] = defaultdict(float)
        for word in sorted(words):
            for position in self._having.get(word, ()):
                found[position] += weight[word] / total
        return found

    def holder(self, sought: Sought) -> Chunk | None:
        """The chunk that holds the answer; None: none does, or one can't tell which."""
        held = {at: share for at, share in self.shares(sought.answer).items() if share >= HOLDS}
        if sought.origin == "citation":
            order = {chunk_id: rank for rank, chunk_id in enumerate(sought.cited)}
            cited = [at for at in held if self.chunks[at].chunk_id in order]
            best = max(cited, key=lambda at: (held[at], -order[self.chunks[at].chunk_id]), default=None)
        elif sought.origin == "document":
            own = [at for at in held if self.chunks[at].document_id == sought.document_id]
            best = max(own, key=lambda at: (held[at], -at), default=None)
        else:
            whole = self.shares(f"{sought.question} {sought.answer}")
            ranked = sorted(held, key=lambda at: (-whole[at], at))
            clear = len(ranked) == 1 or (len(ranked) > 1 and whole[ranked[0]] - whole[ranked[1]] >= CLEARLY)
            best = ranked[0] if clear else None
        return None if best is None else self.chunks[best]


def seek(derived: Iterable[Question], feedback: pa.Table, exchanges: pa.Table) -> list[Sought]:
    """All questions with an answer that is known or was rated well: what users said before what documents give, each by
    hash, so that what is chosen hardly changes when there is more."""
    said = [
        *(Sought(one.question, one.answer, "correction", one.simulated) for one in corrections(feedback)),
        *_cited(feedback, exchanges),
    ]
    documents = [
        Sought(one.question, one.answer, "document", False, one.document_id)
        for one in derived
        if one.split == "training"
    ]
    return [*_ordered(said), *_ordered(documents)]


def choose_pairs(
    sought: Sequence[Sought],
    corpus: Corpus,
    held_out: Sequence[str],
    found: Callable[[str, int], Sequence[Hit]],
    size: int,
) -> tuple[list[Pair], dict[str, int]]:
    """At most `size` pairs whose questions are not nearly one of `held_out`, and what was left out, by reason.

    Args:
        found: what the model of now finds for a question.

    Raises:
        TrainingError: a question is nearly one of `held_out` all the same.
    """

    def paired(one: Sought) -> Pair | None:
        chunk = corpus.holder(one)
        if chunk is None:
            return None
        others = (hit.chunk_id for hit in found(one.question, NEIGHBOURS) if hit.document_id != chunk.document_id)
        negative = next((other for other in others if other in corpus.by_id), None)
        if negative is None:
            return None
        return Pair(one.question, one.origin, one.simulated, chunk.chunk_id, negative, _is_held_out(chunk.document_id))

    pairs, left_out = take(sought, held_out, paired, size)
    refuse_near([pair.question for pair in pairs], held_out)
    unknown = left_out.pop("answer not retrieved", 0)
    return pairs, left_out | ({"no chunk is known to hold the answer": unknown} if unknown else {})


def _is_held_out(document_id: str) -> bool:
    """By document and by hash: what was measured on once is never trained on later."""
    return int(content_hash("held out", document_id), 16) % HELD_OUT == 0


def _cited(feedback: pa.Table, exchanges: pa.Table) -> Iterator[Sought]:
    """Answers that were rated well, the latest of each question."""
    citations = dict(zip(exchanges["completion_id"].to_pylist(), exchanges["citations"].to_pylist(), strict=True))
    latest: dict[str, Sought] = {}
    for row in feedback.sort_by([("occurred_at", "ascending"), ("completion_id", "ascending")]).to_pylist():
        question, answer = row["question"].strip(), (row["answer"] or "").strip()
        cited = citations.get(row["completion_id"])
        if row["rating"] < LOW_RATING or not cited or not answer or not 0 < len(question) <= MAX_QUESTION:
            continue
        key = " ".join(normalised_words(question)) or question
        latest[key] = Sought(question, answer, "citation", row["simulated"], cited=tuple(cited))
    yield from latest.values()


def _ordered(sought: Collection[Sought]) -> list[Sought]:
    return sorted({one.example_id: one for one in sought}.values(), key=lambda one: one.example_id)
