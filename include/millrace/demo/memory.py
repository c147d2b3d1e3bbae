"""The most memory that everything this process started held at once, sampled while a block runs."""

import os
import threading
from types import TracebackType
from typing import Self

import psutil

_EVERY_SECONDS = 10.0


class MemoryPeak:
    """`bytes`: the largest sum so far of proportional set sizes (shared pages counted once), of this process and
    everything below it. What left the process tree (a daemon) is not counted."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory peak", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process(os.getpid())
        while True:
            self.bytes = max(self.bytes, sum(_held(process) for process in [me, *me.children(recursive=True)]))
            if self._ended.wait(_EVERY_SECONDS):
                return


def _held(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it ended meanwhile
        return 0
