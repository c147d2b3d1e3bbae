"""What the terminal shows while the story runs: each stage, what it is doing, how long it took.

On a terminal one live table; elsewhere a line when a state changes, and every few seconds when a detail does.
Knows nothing about what a stage does.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

State = Literal["waiting", "running", "done", "nothing new", "refused", "failed"]
MARKS: dict[State, str] = {
    "waiting": "[dim]·[/]",
    "running": "[cyan]▸[/]",
    "done": "[green]✓[/]",
    "nothing new": "[green]=[/]",
    "refused": "[yellow]✗[/]",
    "failed": "[red]✗[/]",
}

LINE_SECONDS = 10.0


@dataclass
class Stage:
    """One line of the display, and one row of the report."""

    name: str
    state: State = "waiting"
    detail: str = ""
    started: float | None = None
    ended: float | None = None
    _printed: tuple[State, str, float] = field(default=("waiting", "", 0.0), repr=False)

    def elapsed(self) -> float:
        """Seconds since the stage began, or that it took; 0 before."""
        return 0.0 if self.started is None else (self.ended or time.monotonic()) - self.started


class Progress:
    """The stages of one story, shown as they change."""

    def __init__(self, names: tuple[str, ...], console: Console | None = None) -> None:
        self.stages = [Stage(name) for name in names]
        self._console = console or Console()
        self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=2, transient=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Run a block as the stage called `name`; what it raises marks the stage failed and goes on up."""
        stage = next(s for s in self.stages if s.name == name)
        stage.state, stage.started = "running", time.monotonic()
        self.say(stage, "")
        try:
            yield stage
        except BaseException as error:
            self._end(stage, "failed")
            self.say(stage, stage.detail or str(error) or type(error).__name__)
            raise
        self._end(stage, "done" if stage.state == "running" else stage.state)
        self.say(stage, stage.detail)

    def say(self, stage: Stage, detail: str) -> None:
        """Show what `stage` is doing now."""
        stage.detail = detail
        if self._console.is_terminal:
            return
        state, printed, at = stage._printed
        now = time.monotonic()
        if stage.state != state or (detail != printed and now - at > LINE_SECONDS):
            stage._printed = (stage.state, detail, now)
            self._console.print(
                f"{stage.name:<22} {stage.state:<12} {stage.elapsed():6.1f} s  {detail}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    @staticmethod
    def _end(stage: Stage, state: State) -> None:
        stage.state, stage.ended = state, time.monotonic()

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for stage in self.stages:
            seconds = "" if stage.state == "waiting" else f"{stage.elapsed():.0f} s"
            table.add_row(MARKS[stage.state], stage.name, f"[dim]{seconds}[/]", stage.detail)
        return table
