"""A person's act and a tick in processes that are killed (SIGKILL) between journal, audit trail and noted head."""

import multiprocessing
import os
import signal
from typing import Any

from millrace.lakehouse.audit import chain
from millrace.rollout import controller, people

PLACES = {"before the trail": (people, "follow"), "before the head is noted": (chain, "note")}
"""Where the process dies → the function that it does not come to."""


def freeze_until(place: str, settings: Any, application: Any) -> int:
    """The exit status of a process that freezes a rollout and dies on its way."""
    return _until(_freeze, place, settings, application)


def tick_until(settings: Any, application: Any) -> int:
    """The exit status of a process whose tick dies when it comes to the trail."""
    return _until(_tick, "", settings, application)


def _until(act: Any, *arguments: Any) -> int:
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, "mlflow"])
    process = forks.Process(target=act, args=arguments)
    process.start()
    process.join()
    return int(process.exitcode)


def _freeze(place: str, settings: Any, application: Any) -> None:
    room, name = PLACES[place]
    setattr(room, name, _die)
    people.freeze(settings, application, actor="ann", reason="erika@example.org complained")


def _tick(_: str, settings: Any, application: Any) -> None:
    controller.follow = _die  # type: ignore[attr-defined]
    controller.tick(settings, application, run="killed")


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
