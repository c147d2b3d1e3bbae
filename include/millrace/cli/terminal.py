"""What every command shares: the console, options, and how a refusal is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from millrace.applications import Application, load_application
from millrace.errors import MillraceError
from millrace.settings import Settings, read_settings

console = Console(highlight=False)

ApplicationName = Annotated[str, typer.Option("--application", "-a", help="Which application.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the journal.")]


def group(says: str) -> typer.Typer:
    """Commands under one word."""
    return typer.Typer(no_args_is_help=True, help=says)


def declaration(application: str) -> tuple[Settings, Application]:
    """The settings of this process, and the application that a command is about."""
    settings = read_settings()
    return settings, load_application(settings, application)


@contextmanager
def one_sentence() -> Iterator[None]:
    """What a room refuses is told in its own sentence, with exit status 1 and no traceback."""
    try:
        yield
    except MillraceError as error:
        Console(stderr=True, highlight=False).print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
