"""Training sets: questions with known answers and users' corrections, prompted as the release prompts, and nothing
that the gate will ask.

A set's id is the hash of its examples; written once, it stays. Knows nothing of how it is trained on.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import TrainingError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES, SILVER_DOCUMENTS, SILVER_FEEDBACK
from millrace.releases.manifest import Manifest
from millrace.releases.prompt import render
from millrace.releases.registry import embedding_folder
from millrace.retrieval.embed import Embedder
from millrace.retrieval.index import builds_of
from millrace.retrieval.search import Hit, Retriever
from millrace.scoring.duplicates import near_duplicates
from millrace.settings import Settings
from millrace.sources.erased import erasures_seen, require_nobody_erased
from millrace.sources.questions import derive_questions
from millrace.training.pool import Asked, corrections, held_out_questions, known_answers
from millrace.training.starting import starting_manifest, starting_weights
from millrace.training.teacher import taught

MINIMUM = 8
"""Examples below which a set is refused."""


class Questioned(Protocol):
    """What has a question."""

    @property
    def question(self) -> str: ...


A = TypeVar("A", bound=Questioned)
E = TypeVar("E")


@dataclass(frozen=True)
class Example:
    """One row of a training set."""

    example_id: str
    origin: str
    simulated: bool
    section: str | None
    question: str
    answer: str
    chunk_ids: tuple[str, ...]
    prompt: str
    """The user message that the release would send to its generator."""

    @property
    def learnt(self) -> dict[str, str]:
        """What the training program is given; the question is for whoever erases a user."""
        return {"question": self.question, "prompt": self.prompt, "answer": self.answer}


def build_training_set(
    settings: Settings,
    application: Application,
    *,
    run: str,
    max_examples: int | None = None,
    start: str | None = None,
    teacher: str | None = None,
) -> dict[str, Any]:
    """Write the training set that documents, feedback and the current index give; the same input, the same set.

    Args:
        max_examples: instead of the declared `training.max_examples`.
        start: a release whose weights go on being trained. What they haven't learnt makes the set, and of what they
            have a share of `training.replay`, so that it isn't forgotten. None: all is to be learnt.
        teacher: a release whose answers are learnt, instead of known ones (`training/teacher.py`).

    Returns:
        `training_set` (None: fewer than 8 examples are new since `start`), `why`; counts `examples`, `corrections`,
        `simulated`, `replayed`; `left_out` (reason → count); `index_build`; `changed`.

    Raises:
        TrainingError: fewer than 8 examples, or one that the gate asks, too.
        RetrievalError: there is no index build.
        ReleaseError: MLflow doesn't answer.
    """
    lake = Lake.of(settings, application.name)
    erased = erasures_seen(lake)
    manifest = starting_manifest(settings, application, run=run)
    size = max_examples or application.training.max_examples
    derived = derive_questions(lake.read(SILVER_DOCUMENTS), application)
    held_out = held_out_questions(lake, derived)
    unfinished = 0
    if teacher:
        pool, unfinished = taught(settings, application, teacher, known_answers(derived), held_out, size=size, run=run)
    else:
        pool = [*corrections(lake.read(SILVER_FEEDBACK)), *known_answers(derived)]
    retrieve, build = retrieval(settings, application, manifest)

    def prompted(asked: Asked) -> Example | None:
        hits = retrieve(asked.question)
        if asked.document_id is not None and asked.document_id not in {hit.document_id for hit in hits}:
            return None
        return Example(
            example_id=asked.example_id,
            origin=asked.origin,
            simulated=asked.simulated,
            section=asked.section,
            question=asked.question,
            answer=asked.answer,
            chunk_ids=tuple(hit.chunk_id for hit in hits),
            prompt=render(manifest.prompt.template, asked.question, hits),
        )

    learnt = _learnt(lake, starting_weights(settings, application, start).training_sets) if start else set()
    replay = application.training.replay if learnt else 0.0
    fresh = [asked for asked in pool if asked.example_id not in learnt]
    examples, left_out = choose(fresh, held_out, prompted, max(min(MINIMUM, size), round(size * (1 - replay))))
    if unfinished:
        left_out["teacher's answer cut short or empty"] = unfinished
    if len(examples) < MINIMUM:
        found = f"application {application.name!r}: {len(examples)} training examples"
        if learnt:
            why = f"{found} are new since release {start}, at least {MINIMUM} are waited for"
            return {"training_set": None, "why": why, "changed": False}
        raise TrainingError(
            f"{found}, at least {MINIMUM} are needed "
            f"(left out: {left_out or 'none'}); ingest documents that give questions outside of the evaluation "
            "and live sections, or gather corrections"
        )
    older = [asked for asked in pool if asked.example_id in learnt]
    replayed, _ = choose(older, held_out, prompted, round(len(examples) * replay / (1 - replay)))
    examples, more = joined(examples, replayed, held_out)
    left_out = dict(Counter(left_out) + Counter(more))
    replayed = [example for example in replayed if example in examples]
    refuse_leaks(examples, held_out, application.questions.evaluation_sections)
    set_id = training_set_id(examples)
    rows = [{"training_set": set_id} | asdict(example) for example in examples]
    require_nobody_erased(lake, erased)
    written = lake.merge(
        GOLD_TRAINING_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema), run=run
    )
    return {
        "training_set": set_id,
        "why": f"{len(examples)} examples",
        "examples": len(examples),
        "corrections": sum(example.origin == "correction" for example in examples),
        "simulated": sum(example.simulated for example in examples),
        "replayed": len(replayed),
        "left_out": left_out,
        "index_build": build,
        "changed": written.changed,
    }


def read_training_set(lake: Lake, set_id: str) -> list[Example]:
    """The examples of a set, in the order of their ids.

    Raises:
        TrainingError: there is no such set, or its rows are not those that its id was made from.
    """
    columns = [name for name in GOLD_TRAINING_EXAMPLES.rows_schema.names if name != "training_set"]
    rows = lake.read(GOLD_TRAINING_EXAMPLES, columns, where=pc.field("training_set") == set_id)
    examples = [
        Example(**row | {"chunk_ids": tuple(row["chunk_ids"])}) for row in rows.sort_by("example_id").to_pylist()
    ]
    if not examples or training_set_id(examples) != set_id:
        raise TrainingError(
            f"training set {set_id} has {len(examples)} rows in gold/training_examples and they don't give its id; "
            "build a set with build_training_set and use the id that it returns"
        )
    return examples


def retrieval(
    settings: Settings, application: Application, manifest: Manifest
) -> tuple[Callable[[str], Sequence[Hit]], str]:
    """What finds a question's chunks as the release would, and the index build that it searches."""
    tuned = embedding_folder(settings, manifest) if manifest.retrieval.tuned else None
    embedder = Embedder(manifest.retrieval.embedding_model, settings.cache, settings.threads, tuned)
    retriever = Retriever(builds_of(settings, application.name, manifest.retrieval.lineage), embedder)
    build = retriever.build
    return lambda question: retriever.search(question, manifest.retrieval.chunks, build), build


def choose(
    pool: Iterable[Asked], held_out: Sequence[str], prompted: Callable[[Asked], Example | None], size: int
) -> tuple[list[Example], dict[str, int]]:
    """At most `size` examples whose questions are not nearly one of `held_out`, and what was left out, by reason.

    The same ones every time, chosen by hash, so that a pool that grows keeps most of them. Corrections take at most
    half while there are other questions: they are rare, and they are what users missed.

    Args:
        prompted: gives None where a question can't be an example.
    """
    examples, left_out = take(_ranked(pool, size), held_out, prompted, size)
    return sorted(examples, key=lambda example: example.example_id), left_out


def joined(
    examples: Sequence[Example], others: Sequence[Example], held_out: Sequence[str]
) -> tuple[list[Example], dict[str, int]]:
    """Both, in the order of their ids, without what only together is nearly one of `held_out`: what is like a question
    depends on what else there is. And what was left out, by reason."""
    both = sorted([*examples, *others], key=lambda example: example.example_id)
    return take(both, held_out, lambda example: example, len(both))


def take(
    ranked: Sequence[A], held_out: Sequence[str], prompted: Callable[[A], E | None], size: int
) -> tuple[list[E], dict[str, int]]:
    """As `choose`, of what is in order already, and in that order."""
    made: dict[A, E | None] = {}
    leaking: set[A] = set()
    # Similarity weighs words by how rare they are, so it is judged on the set as it will be, until none is left.
    while True:
        chosen: list[A] = []
        for asked in ranked:
            if len(chosen) == size:
                break
            if asked not in made:
                made[asked] = prompted(asked)
            if made[asked] is not None and asked not in leaking:
                chosen.append(asked)
        found = near_duplicates([asked.question for asked in chosen], held_out)
        if not found:
            break
        leaking |= {chosen[position] for position in found}
    counted = {
        "answer not retrieved": sum(example is None for example in made.values()),
        "nearly an evaluation question": len(leaking),
    }
    return [example for asked in chosen if (example := made[asked])], {k: n for k, n in counted.items() if n}


def refuse_leaks(examples: Sequence[Example], held_out: Sequence[str], evaluation_sections: Sequence[str]) -> None:
    """Raises:
    TrainingError: an example's question is, or is nearly, one of `held_out`, or belongs to an evaluation section.
    """
    for example in examples:
        if example.section is not None and example.section in evaluation_sections:
            raise TrainingError(
                f"training question {example.question!r} belongs to evaluation section {example.section!r}"
            )
    refuse_near([example.question for example in examples], held_out)


def refuse_near(questions: Sequence[str], held_out: Sequence[str]) -> None:
    """Raises:
    TrainingError: one of them is, or is nearly, one of `held_out`.
    """
    for position, near in near_duplicates(questions, held_out).items():
        raise TrainingError(
            f"training question {questions[position]!r} is nearly the evaluation question {held_out[near]!r}"
        )


def training_set_id(examples: Sequence[Example]) -> str:
    """`train-` and 16 hexadecimal digits, of the examples whatever their order."""
    content = sorted(json.dumps(asdict(example), sort_keys=True) for example in examples)
    return f"train-{content_hash(*content)[:16]}"


def _learnt(lake: Lake, training_sets: Sequence[str]) -> set[str]:
    """The ids of the examples in these sets."""
    rows = lake.read(GOLD_TRAINING_EXAMPLES, ["example_id"], where=pc.field("training_set").isin(training_sets))
    return set(rows["example_id"].to_pylist())


def _ranked(pool: Iterable[Asked], size: int) -> list[Asked]:
    """Each once, in the order in which they are taken."""
    unique = sorted({asked.example_id: asked for asked in pool}.values(), key=lambda asked: asked.example_id)
    corrected = [asked for asked in unique if asked.origin == "correction"]
    others = [asked for asked in unique if asked.origin != "correction"]
    first = size // 2 if others else size
    return [*corrected[:first], *others, *corrected[first:]]
