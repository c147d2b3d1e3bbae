"""What a release was trained on, whichever kind of set its tag names: nobody may be tested on that."""

import pyarrow.compute as pc

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_PREFERENCE_EXAMPLES, GOLD_TRAINING_EXAMPLES


def trained_questions(lake: Lake, training_set: str) -> list[str]:
    """The questions of a set of answers or of preferences; empty where there is no such set."""
    of_set = pc.field("training_set") == training_set
    return [
        question
        for table in (GOLD_TRAINING_EXAMPLES, GOLD_PREFERENCE_EXAMPLES)
        for question in lake.read(table, ["question"], where=of_set)["question"].to_pylist()
    ]
