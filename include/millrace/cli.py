"""`millrace …`: everything a person does by hand. Each command is a few lines over one room of the package."""

import json
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from millrace.errors import MillraceError
from millrace.settings import Settings, read_settings
from millrace.stack import Status, down, status, up
from millrace.stack.display import StartDisplay
from millrace.stack.parts import ADMIN, password_file

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.callback()
def main() -> None:
    """The whole life of LLM applications on Airflow, a Delta Lakehouse, MLflow and Qdrant."""


@app.command("up")
def up_command() -> None:
    """Start the stack in the background; return when all of it works."""
    settings = _settings()
    try:
        with StartDisplay(console) as display:
            up(settings, on_progress=display)
    except MillraceError as error:
        _fail(error)
    console.print(places(settings))


@app.command("down")
def down_command() -> None:
    """End the stack, and whatever of it was left running."""
    try:
        ran = down(_settings())
    except MillraceError as error:
        _fail(error)
    console.print("The stack has ended." if ran else "Nothing was running.")


@app.command("status")
def status_command(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """What is running, and how it is. The exit status is 0 only if all of it works."""
    try:
        found = status(_settings())
    except MillraceError as error:
        _fail(error)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _show(found)
    if not found.healthy:
        raise typer.Exit(1)


def places(settings: Settings) -> str:
    """Where a person finds what runs."""
    return (
        f"Airflow   {settings.airflow_url}   user {ADMIN}, password in {password_file(settings.home)}\n"
        f"MLflow    {settings.mlflow_url}\n"
        f"Gateway   {settings.gateway_url}/v1\n"
        f"Logs      {settings.home / 'logs'}"
    )


def _show(found: Status) -> None:
    console.print(f"{found.home}: {found.state}" + (f" (process {found.pid})" if found.pid else ""))
    if found.message:
        console.print(f"The last start failed: {found.message}", markup=False)
    if not found.parts or found.state == "stopped":
        return
    table = Table(box=None, pad_edge=False)
    for name in ("part", "state", "process", "memory", "up", "address"):
        table.add_column(name, justify="right" if name in ("process", "memory", "up") else "left")
    for part in found.parts:
        state = "healthy" if part.healthy else ("unhealthy" if part.pid else "ended")
        table.add_row(
            part.part, state, str(part.pid or ""), f"{part.memory_mb} MB", f"{part.up_seconds} s", part.url
        )  # fmt: skip
    console.print(table)
    console.print(f"{sum(part.memory_mb for part in found.parts)} MB in all")


def _settings() -> Settings:
    try:
        return read_settings()
    except MillraceError as error:
        _fail(error)


def _fail(error: MillraceError) -> NoReturn:
    Console(stderr=True, highlight=False).print(str(error), markup=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
