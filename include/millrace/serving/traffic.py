"""Which loaded release answers whom, for one application: the split as last read, and the releases it names.

A thread of its own reads the split and loads what it names before any request is routed there, so that nobody waits
for a cold release; while the registry can't be reached, the last known split goes on. It does not know how a split
is decided (`rollout`), nor what is done with an answer (`exchange.py`).
"""

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import SecretStr

from millrace.applications import Application
from millrace.errors import MillraceError
from millrace.releases.loader import ReleaseLoader
from millrace.releases.pipeline import AnswerPipeline
from millrace.releases.published_split import read_split
from millrace.releases.registry import versions
from millrace.releases.split import Assignment, Split, assign
from millrace.secret_sources import hide
from millrace.serving.refusal import Refusal, unavailable
from millrace.settings import Settings

POLL_SECONDS = 2.0
"""Between two looks at the split."""
RETRY_SECONDS = 10.0
"""Before a release that could not be loaded is tried again."""
MOST_PINNED = 2
"""Releases outside the split that stay loaded for callers who pin them."""
WARM_UP = "What is this about?"

log = logging.getLogger("millrace.serving")


class Releases(Protocol):
    """Where releases come from. All of it may take seconds, and raise MillraceError."""

    def split(self) -> Split | None:
        """None: nothing has been published yet."""
        ...

    def versions(self) -> set[str]: ...

    def load(self, version: str) -> AnswerPipeline:
        """Loaded once, kept until `unload`."""
        ...

    def unload(self, version: str) -> None: ...

    def close(self) -> None: ...


class RegisteredReleases:
    """An application's releases in the MLflow registry."""

    def __init__(self, settings: Settings, application: Application) -> None:
        self._settings = settings
        self._application = application
        self._loader = ReleaseLoader(settings, application)
        self.load = self._loader.load
        self.unload = self._loader.unload
        self.close = self._loader.close

    def split(self) -> Split | None:
        return read_split(self._settings, self._application.name)

    def versions(self) -> set[str]:
        return set(versions(self._settings, self._application))


@dataclass(frozen=True)
class Route:
    """What one exchange may use. The pipelines stay loaded as long as the route is held."""

    assignment: Assignment
    pinned: bool
    pipeline: AnswerPipeline | None
    broken: str | None
    """Why there is no pipeline."""
    fallback: AnswerPipeline | None
    fallback_version: str | None
    """The champion, where a challenger was assigned."""


@dataclass(frozen=True)
class _Loaded:
    """A split all of whose releases are loaded, or known not to load."""

    split: Split
    pipelines: Mapping[str, AnswerPipeline]
    broken: Mapping[str, str]


@dataclass
class _Failure:
    reason: str
    at: float = field(default_factory=time.monotonic)

    @property
    def fresh(self) -> bool:
        return time.monotonic() - self.at < RETRY_SECONDS


class Traffic:
    """Thread-safe. `start` begins to follow the split; `turn` is one look at it."""

    def __init__(self, application: str, releases: Releases, secrets: Sequence[SecretStr] = ()) -> None:
        """
        Args:
            secrets: hidden in what a release breaks with, which callers are told.
        """
        self.application = application
        self._releases = releases
        self._secrets = secrets
        self._loaded: _Loaded | None = None
        self._trouble = "the split has not been read yet"
        self._unreleased = False
        self._failures: dict[str, _Failure] = {}
        self._since: dict[str, int] = {}
        self._pinned: OrderedDict[str, AnswerPipeline] = OrderedDict()
        self._retired: set[str] = set()
        self._at_work: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"traffic-{application}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End following and unload everything; no route may be held any more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._releases.close()

    @property
    def not_ready(self) -> str | None:
        """Why nothing can be answered; None: ready."""
        return self._trouble if self._loaded is None else None

    @property
    def unreleased(self) -> bool:
        """Whether this gateway saw the application without a champion and waits for its first."""
        return self._loaded is None and self._unreleased

    def models(self) -> dict[str, int]:
        """Names that can be asked → since when (Unix seconds) this process has what answers them."""
        loaded = self._loaded
        if loaded is None:
            return {}
        named = {f"{self.application}@{version}": self._since[version] for version in loaded.pipelines}
        for arm in ("champion", "challenger"):
            version = getattr(loaded.split, arm)
            if version in loaded.pipelines:
                named[f"{self.application}@{arm}"] = self._since[version]
        return {self.application: self._since[loaded.split.champion or ""], **named}

    @contextmanager
    def route(self, pin: str | None, user: str) -> Iterator[Route]:
        """The release for `user`, or the pinned one (loaded first where it isn't yet).

        Raises:
            Refusal: nothing is loaded yet, or there is no such release.
        """
        with self._lock:
            route = self._routed(pin, user)
            if route is not None:
                self._hold(route)
        if route is None:
            route = self._load_pinned(pin or "")
        try:
            yield route
        finally:
            with self._lock:
                self._at_work.subtract(_used(route))

    def turn(self) -> None:
        """Read the split, load what it names, and follow it once that is done. Never raises."""
        try:
            split = self._releases.split()
        except MillraceError as error:
            self._say(str(error))
            return
        if split is None or split.champion is None:
            self._unreleased = True
            self._say(f"no release of {self.application} is champion yet; declare one and admit it")
            return
        with self._loading:
            self._drop_broken()
            self._adopt(split, split.champion)
            self._unload_unused()

    def _drop_broken(self) -> None:
        """Unload what has an engine that broke, so that it is loaded anew; until then its users are told so. Releases
        with the same weights share one, which is closed when the last of them lets it go."""
        with self._lock:
            loaded = self._loaded
            warm = {**self._pinned, **(loaded.pipelines if loaded else {})}
            broken = {version: reason for version, one in warm.items() if (reason := one.engine.broken)}
            for version in broken:
                self._pinned.pop(version, None)
            if loaded is not None and broken.keys() & loaded.pipelines.keys():
                pipelines = {version: one for version, one in loaded.pipelines.items() if version not in broken}
                told = {**loaded.broken, **broken}
                # Without the champion nothing is left to fall back on.
                self._loaded = _Loaded(loaded.split, pipelines, told) if loaded.split.champion in pipelines else None
        for version, reason in broken.items():
            self._say(f"version {version} is loaded again: {reason}")
            self._releases.unload(version)

    def _adopt(self, split: Split, champion: str) -> None:
        pipelines: dict[str, AnswerPipeline] = {}
        broken: dict[str, str] = {}
        for version in filter(None, (champion, split.challenger)):
            try:
                pipelines[version] = self._load(version)
            except MillraceError as error:
                broken[version] = str(error)
        if champion in broken:
            self._say(f"the champion, version {champion}, can't be loaded: {broken[champion]}")
            return
        adopted = _Loaded(split, pipelines, broken)
        with self._lock:
            before = self._loaded
            self._loaded = adopted
            if before is not None:
                self._retired |= before.pipelines.keys() - pipelines.keys()
            # What broke while it warmed up may be loaded all the same.
            given_up = {version for version, failure in self._failures.items() if not failure.fresh} - broken.keys()
            self._retired |= given_up
            for version in given_up:
                del self._failures[version]
        if before is None or before.split != split:
            log.info("%s follows split %s", self.application, split.model_dump_json())

    def _load(self, version: str) -> AnswerPipeline:
        """The warm pipeline of `version`; a failure is remembered for a while instead of repeated at once."""
        if self._loaded is not None and version in self._loaded.pipelines:
            return self._loaded.pipelines[version]
        failure = self._failures.get(version)
        if failure is not None and failure.fresh:
            raise Refusal(503, failure.reason, code="release_unavailable")
        try:
            pipeline = self._releases.load(version)
            pipeline.answer(WARM_UP)
        except Exception as error:
            # Whatever a release breaks with stays with that release: the others go on serving.
            reason = hide(str(error) or type(error).__name__, *self._secrets)
            self._failures[version] = _Failure(reason)
            log.warning("%s version %s can't be loaded: %s", self.application, version, reason)
            raise Refusal(503, reason, code="release_unavailable") from error
        self._failures.pop(version, None)
        self._since[version] = int(time.time())
        return pipeline

    def _routed(self, pin: str | None, user: str) -> Route | None:
        """None: the pinned version isn't loaded. Under the lock."""
        loaded = self._loaded
        if loaded is None:
            raise unavailable(f"{self.application} is not ready: {self._trouble}")
        split = loaded.split
        if pin is None:
            assignment = assign(split, user)
            challenged = assignment.arm == "challenger"
            return Route(
                assignment=assignment,
                pinned=False,
                pipeline=loaded.pipelines.get(assignment.version),
                broken=loaded.broken.get(assignment.version),
                fallback=loaded.pipelines[split.champion or ""] if challenged else None,
                fallback_version=split.champion if challenged else None,
            )
        if pin == "challenger" and split.challenger is None:
            raise self._unknown(f"{self.application} has no challenger now")
        version = {"champion": split.champion, "challenger": split.challenger}.get(pin, pin) or ""
        pipeline = loaded.pipelines.get(version) or self._pinned.get(version)
        if pipeline is None and version not in loaded.broken:
            return None
        if version in self._pinned:
            self._pinned.move_to_end(version)
        return _pinned_route(version, pipeline, loaded.broken.get(version))

    def _load_pinned(self, version: str) -> Route:
        known = self._ask_versions()
        if version not in known:
            raise self._unknown(f"{self.application} has no release {version!r}; it has {', '.join(sorted(known))}")
        with self._loading:
            pipeline = self._load(version)
            with self._lock:
                self._pinned[version] = pipeline
                self._pinned.move_to_end(version)
                self._retired.discard(version)
                while len(self._pinned) > MOST_PINNED:
                    self._retired.add(self._pinned.popitem(last=False)[0])
                route = _pinned_route(version, pipeline, None)
                self._hold(route)
            self._unload_unused()
        return route

    def _ask_versions(self) -> set[str]:
        try:
            return self._releases.versions()
        except MillraceError as error:
            raise unavailable(str(error)) from None

    def _unload_unused(self) -> None:
        """Unload what left the split and nobody is using; the rest waits for the next turn."""
        with self._lock:
            kept = {*self._pinned, *(self._loaded.pipelines if self._loaded else ())}
            self._retired -= kept
            idle = {version for version in self._retired if not self._at_work[version]}
            self._retired -= idle
        for version in idle:
            self._releases.unload(version)
            self._since.pop(version, None)

    def _hold(self, route: Route) -> None:
        self._at_work.update(_used(route))

    def _say(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning("%s: %s", self.application, trouble)
        self._trouble = trouble

    def _unknown(self, sentence: str) -> Refusal:
        return Refusal(404, sentence, code="model_not_found", param="model")

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.turn()
            except Exception:
                # The thread must outlive what nobody foresaw, or the gateway would serve an old split for ever.
                log.exception("%s: the split could not be followed", self.application)
            self._stop.wait(POLL_SECONDS)


def _pinned_route(version: str, pipeline: AnswerPipeline | None, broken: str | None) -> Route:
    return Route(Assignment(version, None, 0.0, None, None), True, pipeline, broken, None, None)


def _used(route: Route) -> list[str]:
    return [version for version in (route.assignment.version, route.fallback_version) if version]
