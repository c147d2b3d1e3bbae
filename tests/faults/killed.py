"""Runs one stage in a process that is killed (SIGKILL) right after its n-th write, if it makes so many.

A write is a Delta commit or a rename: both are what the libraries themselves do last. The process is forked from one
that has imported the stages already, and has done nothing else: a new interpreter would take its seconds for each kill.
"""

import multiprocessing
import os
import signal
from datetime import UTC, datetime, timedelta
from typing import Any

import deltalake
import deltalake.table

from millrace.evaluation.canaries import publish_build
from millrace.evaluation.sets import freeze_evaluation_set
from millrace.monitoring.drift import measure_drift
from millrace.monitoring.metrics import measure
from millrace.monitoring.watch import check
from millrace.policies import Bound, Monitor
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import refresh_embeddings
from millrace.retrieval.index import build_index
from millrace.sources.feedback import land_events, refine_feedback
from millrace.sources.ingest import land_documents, refine_documents
from millrace.training.sets import build_training_set

HOUR = datetime(2026, 11, 24, 12, tzinfo=UTC)
IMPORTED_LATE = ("great_expectations", "mlflow.artifacts", "openvino", "tokenizers")
"""What the stages import on first use."""

writes_left = 1


def run_until_write(name: str, settings: Any, application: Any, writes: int) -> int:
    """The exit status: 0 where the stage ended with fewer writes, minus SIGKILL where it was killed after them."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, *IMPORTED_LATE])
    process = forks.Process(target=_run, args=(name, settings, application, writes))
    process.start()
    process.join()
    return int(process.exitcode)


def _run(name: str, settings: Any, application: Any, writes: int) -> None:
    global writes_left
    writes_left = writes
    deltalake.table.TableMerger.execute = dying_commit(deltalake.table.TableMerger.execute)
    deltalake.write_deltalake = dying(deltalake.write_deltalake)
    os.rename, os.replace = dying(os.rename), dying(os.replace)
    stage(name, settings, application)


def written() -> None:
    global writes_left
    writes_left -= 1
    if not writes_left:
        os.kill(os.getpid(), signal.SIGKILL)


def dying(function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        written()
        return result

    return run


def dying_commit(function: Any) -> Any:
    """Counts only if the table's version moved: a merge that finds nothing to do writes nothing."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self._table.version()
        result = function(self, *args, **kwargs)
        if self._table.version() != before:
            written()
        return result

    return run


def stage(name: str, settings: Any, application: Any) -> None:
    interval = {"start": HOUR, "end": HOUR + timedelta(hours=1)}
    stages: dict[str, Any] = {
        "land documents": lambda: land_documents(settings, application, run="killed"),
        "refine documents": lambda: refine_documents(settings, application, run="killed"),
        "chunk": lambda: refresh_chunks(settings, application, run="killed"),
        "embed": lambda: refresh_embeddings(settings, application, run="killed"),
        "build and publish": lambda: publish_build(
            settings, application, build_index(settings, application, run="killed")["build"], run="killed"
        ),
        "land events": lambda: land_events(settings, application, **interval, run="killed"),
        "refine feedback": lambda: refine_feedback(settings, application, **interval, run="killed"),
        "monitor": lambda: watch(settings, application, **interval),
        "training set": lambda: build_training_set(settings, application, run="killed"),
        "evaluation set": lambda: freeze_evaluation_set(settings, application, run="killed"),
    }
    stages[name]()


def watch(settings: Any, application: Any, start: datetime, end: datetime) -> None:
    """One run of the monitor, by a policy that the exchanges of the test breach."""
    policy = Monitor(bounds=(Bound(metric="cost_per_exchange", above=0.0001, minimum=2),))
    application = application.model_copy(update={"monitor": policy})
    measured = measure(settings, application, start, end, run="killed")
    measure_drift(settings, application, measured, run="killed", now=end)
    check(settings, application, measured, run="killed", now=end)
