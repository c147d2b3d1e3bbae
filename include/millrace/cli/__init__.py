"""`millrace …`: everything a person does by hand. Each command is a few lines over one room of the package."""

import getpass
import json
from contextlib import ExitStack
from typing import Annotated, Any

import typer
from rich.table import Table

from millrace.cli.access import access_app
from millrace.cli.audit import audit_app
from millrace.cli.backfill import backfill_command
from millrace.cli.backup import backup_command, restore_command
from millrace.cli.batch import batch_app
from millrace.cli.cost import cost_app
from millrace.cli.environments import env_app
from millrace.cli.erase import erase_command
from millrace.cli.keys import key_app
from millrace.cli.prompts import prompt_app
from millrace.cli.releases import index_app, release_app, rollout_app
from millrace.cli.secrets import secret_app
from millrace.cli.terminal import ApplicationName, console, one_sentence
from millrace.environments.access.airflow_wall import declared_logins, password_file
from millrace.errors import StackError
from millrace.settings import AIRFLOW_SERVICE, Settings, read_settings
from millrace.stack import Stack, Status, airflow_of, down, status, up
from millrace.stack.display import StartDisplay

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(release_app, name="release")
app.add_typer(rollout_app, name="rollout")
app.add_typer(prompt_app, name="prompt")
app.add_typer(index_app, name="index")
app.add_typer(batch_app, name="batch")
app.add_typer(key_app, name="key")
app.add_typer(secret_app, name="secret")
app.add_typer(cost_app, name="cost")
app.add_typer(audit_app, name="audit")
app.command("backfill")(backfill_command)
app.command("erase")(erase_command)
app.add_typer(access_app, name="access")
app.add_typer(env_app, name="env")
app.command("backup")(backup_command)
app.command("restore")(restore_command)


@app.callback()
def main() -> None:
    """The whole life of LLM applications on Airflow, a Delta Lakehouse, MLflow and Qdrant."""


@app.command("up")
def up_command() -> None:
    """Start the stack in the background; return when all of it works."""
    with one_sentence():
        settings = read_settings()
        with StartDisplay(console) as display:
            up(settings, on_progress=display)
        console.print(places(settings))


@app.command("down")
def down_command() -> None:
    """End the stack, and whatever of it was left running."""
    with one_sentence():
        ran = down(read_settings())
        console.print("The stack has ended." if ran else "Nothing was running.")


@app.command("run")
def run_command(
    once: Annotated[bool, typer.Option("--once", help="End after the loop instead of serving on.")] = False,
    application: ApplicationName = "qa",
) -> None:
    """Start the stack, turn the loop once on real documents with simulated users, report, and keep serving.

    With --once the exit status is 0 only if every stage did its work.
    """
    from millrace.demo.run import tell_story

    with one_sentence():
        settings = read_settings()
        with StartDisplay(console) as display, Stack(settings, on_progress=display) as stack:
            display.stop()
            with stack.airflow() as airflow:
                told = tell_story(stack.settings, application, airflow, console)
            console.print(f"\n{told.headline}\n\nReport    {told.page}\n{places(stack.settings)}", markup=False)
            if once:
                if told.failure:
                    raise StackError(told.failure)
                return
            console.print("\nServing until Ctrl-C.")
            stack.wait()


@app.command("status")
def status_command(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """What is running, who answers, what was decided last. The exit status is 0 only if all parts work."""
    from millrace.demo.overview import overview

    with one_sentence():
        settings = read_settings()
        found = status(settings)
        running = {part.part for part in found.parts if part.healthy}
        with ExitStack() as stack:
            airflow = stack.enter_context(airflow_of(settings)) if "airflow" in running else None
            applications = overview(settings, airflow)
    if as_json:
        print(json.dumps(found.to_json() | {"applications": applications}, indent=1, default=str))
    else:
        _show(found)
        _show_applications(applications)
    if not found.healthy:
        raise typer.Exit(1)


@app.command("ask")
def ask_command(
    question: str,
    application: ApplicationName = "qa",
    release: Annotated[str, typer.Option(help="champion, challenger or a version; empty: as the split says.")] = "",
    user: Annotated[str, typer.Option(help="Who asks: the same user stays with the same release.")] = "",
) -> None:
    """Ask the gateway; print the answer, its citations and its release."""
    from millrace.demo.ask import ask

    with one_sentence():
        answer = ask(
            read_settings(),
            f"{application}@{release}" if release else application,
            question,
            user=user or getpass.getuser(),
        )
    console.print(answer.text, markup=False)
    for number, citation in enumerate(answer.citations, 1):
        console.print(f"  [{number}] {citation}", markup=False, style="dim", soft_wrap=True)
    console.print(f"  {answer.about}", markup=False, style="dim", soft_wrap=True)


def places(settings: Settings) -> str:
    """Where a person finds what runs."""
    people = ", ".join(name for name in declared_logins(settings) if name != AIRFLOW_SERVICE)
    who = f"log in as {people}" if people else "nobody may log in yet: name people in MILLRACE_AIRFLOW_USERS"
    return (
        f"Airflow   {settings.airflow_url}   {who}; passwords in {password_file(settings.home)}\n"
        f"MLflow    {settings.mlflow_url}\n"
        f"Gateway   {', '.join(f'{url}/v1' for url in settings.gateway_urls)}\n"
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


def _show_applications(applications: dict[str, dict[str, Any]]) -> None:
    for name, told in applications.items():
        challenger = f", challenger {told['challenger']} at {told['share']:.0%}" if told["challenger"] else ""
        console.print(f"{name}: champion {told['champion'] or 'none yet'}{challenger}", markup=False)
        if told["last_decision"]:
            last = told["last_decision"]
            console.print(
                f"  last decision {last['sequence']}: {last['kind']}, {last['reason']}", markup=False, soft_wrap=True
            )
        for run in told["last_runs"]:
            console.print(f"  {run['dag']:<28}{run['state']:<10}{run['started'] or ''}", markup=False)
