"""`millrace …`: everything a person does by hand. Each command is a few lines over one room of the package."""

import getpass
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from millrace.errors import MillraceError, StackError
from millrace.settings import Settings, read_settings
from millrace.stack import Stack, Status, airflow_of, down, status, up
from millrace.stack.display import StartDisplay
from millrace.stack.parts import ADMIN, password_file

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
release_app = typer.Typer(no_args_is_help=True, help="Releases: list, and let one past the gate.")
rollout_app = typer.Typer(no_args_is_help=True, help="Rollouts: what people decide by hand, with a reason.")
index_app = typer.Typer(no_args_is_help=True, help="Index builds: list, and publish the one before again.")
batch_app = typer.Typer(no_args_is_help=True, help="Questions in a table, answered on Spark: submit, and how far.")
app.add_typer(release_app, name="release")
app.add_typer(rollout_app, name="rollout")
prompt_app = typer.Typer(no_args_is_help=True, help="Prompts: versions, what changed, try one, look for a better one.")
app.add_typer(prompt_app, name="prompt")
app.add_typer(index_app, name="index")
app.add_typer(batch_app, name="batch")
console = Console(highlight=False)

ApplicationName = Annotated[str, typer.Option("--application", "-a", help="Which application.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the journal.")]


@app.callback()
def main() -> None:
    """The whole life of LLM applications on Airflow, a Delta Lakehouse, MLflow and Qdrant."""


@app.command("up")
def up_command() -> None:
    """Start the stack in the background; return when all of it works."""
    with _one_sentence():
        settings = read_settings()
        with StartDisplay(console) as display:
            up(settings, on_progress=display)
        console.print(places(settings))


@app.command("down")
def down_command() -> None:
    """End the stack, and whatever of it was left running."""
    with _one_sentence():
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

    with _one_sentence():
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

    with _one_sentence():
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

    with _one_sentence():
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


@app.command("cost")
def cost_command(
    application: ApplicationName = "qa",
    since: Annotated[datetime | None, typer.Option(help="Only from this moment on, UTC; empty: ever.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What an application cost at its declared prices, by stage and by release; both add up to the total."""
    from millrace.applications import load_application
    from millrace.monitoring.cost import costs

    with _one_sentence():
        settings = read_settings()
        found = costs(settings, load_application(settings, application), since)
    if as_json:
        print(json.dumps(asdict(found), indent=1, default=str))
        return
    for title, lines in (("stage", found.by_stage), ("release", found.by_release)):
        table = Table(title, "version", "uses", "tokens", "machine", "cost", box=None, pad_edge=False)
        for line in lines:
            used = (f"{line.uses:,}", f"{line.tokens:,}", f"{line.seconds / 60:.1f} min", f"${line.cost_usd:.6f}")
            table.add_row(line.name, line.version, *used)
        console.print(table)
    answers = next((line for line in found.by_stage if line.name == "serving"), None)
    told = f"; {answers.simulated:,} of {answers.uses:,} answers to simulated users" if answers else ""
    console.print(f"${found.total_usd:.6f} in all{told}", markup=False)


@release_app.command("list")
def release_list(application: ApplicationName = "qa") -> None:
    """Every registered release with its tags."""
    from millrace.applications import load_application
    from millrace.releases.registry import versions

    with _one_sentence():
        settings = read_settings()
        for version, tags in versions(settings, load_application(settings, application)).items():
            told = ", ".join(f"{key.removeprefix('millrace.')}={value}" for key, value in sorted(tags.items()))
            console.print(f"{version:>4}  {told}", markup=False, soft_wrap=True)


@release_app.command("admit")
def release_admit(version: str, reason: Reason, application: ApplicationName = "qa") -> None:
    """Let a registered release roll out whatever the gate says; recorded with your name."""
    _decide("admit", application, reason, version=version)


@index_app.command("list")
def index_list(application: ApplicationName = "qa") -> None:
    """The index builds of the declared lineage, newest last, and which is published."""
    from millrace.applications import load_application
    from millrace.retrieval.index import declared_builds

    with _one_sentence():
        settings = read_settings()
        builds = declared_builds(settings, load_application(settings, application))
        pointer = builds.published()
        marks = {pointer.build: "published", pointer.previous: "previous"} if pointer else {}
        for manifest in builds.manifests():
            console.print(
                f"{manifest.build}  {manifest.built_at:%Y-%m-%d %H:%M} UTC  {manifest.chunks} chunks of "
                f"{manifest.documents} documents  {marks.get(manifest.build, '')}",
                markup=False,
                soft_wrap=True,
            )
        console.print(f"in {builds.where}", markup=False, style="dim", soft_wrap=True)


@index_app.command("back")
def index_back(application: ApplicationName = "qa") -> None:
    """Publish the index build before the published one again; a second time, and that one is back."""
    from millrace.applications import load_application
    from millrace.retrieval.index import publish_previous

    with _one_sentence():
        settings = read_settings()
        moved = publish_previous(settings, load_application(settings, application))
        console.print(f"Published {moved.build} of {application}; before it was {moved.previous}.", markup=False)


@prompt_app.command("list")
def prompt_list(application: ApplicationName = "qa") -> None:
    """Every version in the prompt registry, and how many exchanges met it."""
    from millrace.applications import load_application
    from millrace.prompts.versions import list_versions

    with _one_sentence():
        settings = read_settings()
        for one in list_versions(settings, load_application(settings, application)):
            told = f"{one.created_at:%Y-%m-%d %H:%M} UTC  {one.exchanges} exchanges  registered by {one.registered_by}"
            console.print(f"{one.version:>4}  {told}", markup=False, soft_wrap=True)


@prompt_app.command("diff")
def prompt_diff(before: int, after: int, application: ApplicationName = "qa") -> None:
    """What changed from one version to another, line by line."""
    from millrace.applications import load_application
    from millrace.prompts.versions import diff

    with _one_sentence():
        settings = read_settings()
        changed = diff(settings, load_application(settings, application), before, after)
        console.print(changed or f"Versions {before} and {after} are the same.", markup=False, soft_wrap=True)


@prompt_app.command("try")
def prompt_try(
    question: str,
    version: Annotated[int | None, typer.Option(help="Which version; empty: the champion's.")] = None,
    template: Annotated[Path | None, typer.Option(help="A file with a template that is not registered.")] = None,
    answer: Annotated[bool, typer.Option("--answer", help="Let the champion's generator answer.")] = False,
    application: ApplicationName = "qa",
) -> None:
    """Render a prompt on a question, with chunks from the published index build."""
    from millrace.applications import load_application
    from millrace.prompts.versions import read_template, template_of, try_template

    with _one_sentence():
        settings = read_settings()
        declared = load_application(settings, application)
        text = read_template(template) if template else template_of(settings, declared, version)
        tried = try_template(settings, declared, text, question, answer=answer)
    console.print(tried.message, markup=False, soft_wrap=True)
    for hit in tried.hits:
        console.print(f"  {hit.score:.3f}  {hit.title}  {hit.chunk_id}", markup=False, style="dim", soft_wrap=True)
    if tried.answer:
        usage = tried.answer.usage
        told = f"  {usage.prompt_tokens} + {usage.completion_tokens} tokens, {tried.answer.seconds:.1f} s"
        console.print(f"\n{tried.answer.text}\n{told}", markup=False, soft_wrap=True)


@prompt_app.command("optimize")
def prompt_optimize(
    trials: Annotated[int | None, typer.Option(min=1, help="Prompts to try; empty: as declared.")] = None,
    token_budget: Annotated[int | None, typer.Option(min=1000, help="Tokens to spend; empty: as declared.")] = None,
    application: ApplicationName = "qa",
) -> None:
    """Look for a better prompt in this process, as the DAG does; register it if it is better."""
    from millrace.applications import load_application
    from millrace.prompts.optimize import optimize_prompt, release_best

    with _one_sentence():
        settings = read_settings()
        declared, run = load_application(settings, application), f"millrace prompt optimize by {getpass.getuser()}"
        result = optimize_prompt(settings, declared, run=run, trials=trials, token_budget=token_budget)
        console.print(result["why"], markup=False, soft_wrap=True)
        released = release_best(settings, declared, result=result, run=run)
        if released["version"]:
            made = f"{released['version']} ({released['release_id']}), with prompt version {released['prompt_version']}"
            console.print(f"Candidate {made}; {application}.evaluate_candidate is next.", markup=False, soft_wrap=True)


@batch_app.command("submit")
def batch_submit(
    path: Annotated[Path, typer.Argument(help=".jsonl or .csv: question, and optionally question_id and asked_at.")],
    batch: Annotated[str | None, typer.Option(help="Name to find them by; empty: the file's.")] = None,
    simulated: Annotated[bool, typer.Option("--simulated", help="A program made them up.")] = False,
    start: Annotated[bool, typer.Option("--start", help="Have them answered now.")] = False,
    application: ApplicationName = "qa",
) -> None:
    """Put a file of questions into bronze/questions, whole or not at all."""
    from millrace.applications import load_application
    from millrace.batch.questions import submit_questions

    with _one_sentence():
        settings = read_settings()
        declared, run = load_application(settings, application), f"millrace batch submit by {getpass.getuser()}"
        done = submit_questions(settings, declared, path, run=run, batch=batch, simulated=simulated)
        console.print(f"{done['batch']}: {done['submitted']} new, {done['known']} known.", markup=False)
        if start:
            with airflow_of(settings) as airflow:
                started = airflow.trigger(f"{application}.batch_inference")
            console.print(f"Started {started.dag_id}, run {started.run_id}.", markup=False)


@batch_app.command("status")
def batch_status(application: ApplicationName = "qa") -> None:
    """How far each release is with each batch of questions."""
    from millrace.applications import load_application
    from millrace.batch.questions import batch_progress

    with _one_sentence():
        settings = read_settings()
        for one in batch_progress(settings, load_application(settings, application)):
            release = f"version {one.release_version}" if one.release_version else "no release"
            told = f"{one.answered} of {one.questions} answered, {one.errors} errors, {one.waiting} waiting"
            console.print(f"{one.batch}  {release}: {told}", markup=False, soft_wrap=True)


@rollout_app.command("freeze")
def rollout_freeze(reason: Reason, application: ApplicationName = "qa") -> None:
    """The controller decides nothing more until somebody resumes."""
    _decide("freeze", application, reason)


@rollout_app.command("resume")
def rollout_resume(reason: Reason, application: ApplicationName = "qa") -> None:
    """The controller decides again."""
    _decide("resume", application, reason)


@rollout_app.command("skip")
def rollout_skip(reason: Reason, application: ApplicationName = "qa") -> None:
    """The challenger becomes champion now."""
    _decide("skip", application, reason)


@rollout_app.command("back")
def rollout_back(reason: Reason, application: ApplicationName = "qa") -> None:
    """End the rollout; without one, the previous champion is back."""
    _decide("roll_back", application, reason)


def places(settings: Settings) -> str:
    """Where a person finds what runs."""
    return (
        f"Airflow   {settings.airflow_url}   user {ADMIN}, password in {password_file(settings.home)}\n"
        f"MLflow    {settings.mlflow_url}\n"
        f"Gateway   {settings.gateway_url}/v1\n"
        f"Logs      {settings.home / 'logs'}"
    )


def _decide(act: str, application: str, reason: str, **arguments: Any) -> None:
    from millrace.applications import load_application
    from millrace.rollout import people

    with _one_sentence():
        settings = read_settings()
        declared = load_application(settings, application)
        decision = getattr(people, act)(settings, declared, actor=getpass.getuser(), reason=reason, **arguments)
        console.print(
            f"Decision {decision.sequence} of {application}: {decision.kind}, {decision.reason}", markup=False
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


@contextmanager
def _one_sentence() -> Iterator[None]:
    """What a room refuses is told in its own sentence, with exit status 1 and no traceback."""
    try:
        yield
    except MillraceError as error:
        Console(stderr=True, highlight=False).print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
