"""Answers that were given before: the same question to the same release over the same index build.

Bounded; the answer that was asked for longest ago goes first. Kept in memory: a new process starts empty.
"""

import threading
from collections import OrderedDict

from millrace.releases.pipeline import Answer

Key = tuple[str, str, str]
"""Release id, index build, question without the white space around it."""


class AnswerCache:
    """Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[Key, Answer] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Answer | None:
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def put(self, key: Key, answer: Answer) -> None:
        with self._lock:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            while len(self._answers) > self._size:
                self._answers.popitem(last=False)
