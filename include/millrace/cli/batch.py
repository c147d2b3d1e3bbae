"""`millrace batch`: questions in a table, answered on Spark."""

import getpass
from pathlib import Path
from typing import Annotated

import typer

from millrace.cli.terminal import ApplicationName, console, declaration, group, one_sentence
from millrace.stack import airflow_of

batch_app = group("Questions in a table, answered on Spark: submit, and how far.")


@batch_app.command("submit")
def batch_submit(
    path: Annotated[Path, typer.Argument(help=".jsonl or .csv: question, and optionally question_id and asked_at.")],
    batch: Annotated[str | None, typer.Option(help="Name to find them by; empty: the file's.")] = None,
    simulated: Annotated[bool, typer.Option("--simulated", help="A program made them up.")] = False,
    start: Annotated[bool, typer.Option("--start", help="Have them answered now.")] = False,
    application: ApplicationName = "qa",
) -> None:
    """Put a file of questions into bronze/questions, whole or not at all."""
    from millrace.batch.questions import submit_questions

    with one_sentence():
        settings, declared = declaration(application)
        run = f"millrace batch submit by {getpass.getuser()}"
        done = submit_questions(settings, declared, path, run=run, batch=batch, simulated=simulated)
        console.print(f"{done['batch']}: {done['submitted']} new, {done['known']} known.", markup=False)
        if start:
            with airflow_of(settings) as airflow:
                started = airflow.trigger(f"{application}.batch_inference")
            console.print(f"Started {started.dag_id}, run {started.run_id}.", markup=False)


@batch_app.command("status")
def batch_status(application: ApplicationName = "qa") -> None:
    """How far each release is with each batch of questions."""
    from millrace.batch.questions import batch_progress

    with one_sentence():
        settings, declared = declaration(application)
        for one in batch_progress(settings, declared):
            release = f"version {one.release_version}" if one.release_version else "no release"
            told = f"{one.answered} of {one.questions} answered, {one.errors} errors, {one.waiting} waiting"
            console.print(f"{one.batch}  {release}: {told}", markup=False, soft_wrap=True)
