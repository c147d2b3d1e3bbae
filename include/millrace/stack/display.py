"""Shows in a terminal how far the parts' start has come: a live table, or, where there is no terminal, a line each."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from millrace.stack.running import Progress

_SIGNS = {"waiting": "[dim]·[/]", "starting": "[yellow]…[/]", "ready": "[green]✓[/]", "failed": "[red]✗[/]"}


class StartDisplay:
    """A progress callback for `Stack` and `up`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._seen: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal to whoever comes next; safe to call twice."""
        if self._live:
            self._live.stop()

    def __call__(self, progress: tuple[Progress, ...]) -> None:
        if self._live:
            self._live.update(_table(progress))
            return
        for one in progress:
            if one.state != self._seen.get(one.part, "waiting"):
                self._seen[one.part] = one.state
                took = f" after {one.seconds:.1f} s" if one.state in ("ready", "failed") else ""
                self._console.print(f"{one.part}: {one.state}{took}")


def _table(progress: tuple[Progress, ...]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for one in progress:
        seconds = f"{one.seconds:.1f} s" if one.state != "waiting" else ""
        table.add_row(_SIGNS[one.state], one.part, seconds)
    return table
