"""What a release was trained on, whichever kind of set its tags name: nobody may be tested on that."""

from collections.abc import Mapping

import pyarrow.compute as pc

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_PREFERENCE_EXAMPLES, GOLD_TRAINING_EXAMPLES

EMBEDDING_TAG = "millrace.embedding"
"""Of a release, the SHA-256 of its fine-tuned embedding model's weights."""
TRAINED_TAGS = ("training_set", "earlier_training_sets", EMBEDDING_TAG)
"""Of a release, what `all_trained_sets` is told by."""


def trained_sets(tags: Mapping[str, str]) -> tuple[str, ...]:
    """The sets that the weights of a release with these tags were trained on, the last one first; those before it are
    from the releases that each fine-tune started from."""
    return (tags["training_set"], *tags.get("earlier_training_sets", "").split()) if "training_set" in tags else ()


def embedding_set(weights_sha256: str) -> str:
    """The set that a fine-tuned embedding model was trained on, in `gold/training_examples`: questions and chunks."""
    return f"embedding-{weights_sha256[:16]}"


def all_trained_sets(tags: Mapping[str, str]) -> tuple[str, ...]:
    """`trained_sets`, and the one of the release's embedding model if that is fine-tuned."""
    return (*trained_sets(tags), *([embedding_set(tags[EMBEDDING_TAG])] if EMBEDDING_TAG in tags else ()))


def trained_questions(lake: Lake, training_set: str) -> list[str]:
    """The questions of a set of answers or of preferences; empty where there is no such set."""
    of_set = pc.field("training_set") == training_set
    return [
        question
        for table in (GOLD_TRAINING_EXAMPLES, GOLD_PREFERENCE_EXAMPLES)
        for question in lake.read(table, ["question"], where=of_set)["question"].to_pylist()
    ]
