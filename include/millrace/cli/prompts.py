"""`millrace prompt`: versions, what changed, try one, look for a better one."""

import getpass
from pathlib import Path
from typing import Annotated

import typer

from millrace.cli.terminal import ApplicationName, console, declaration, group, one_sentence

prompt_app = group("Prompts: versions, what changed, try one, look for a better one.")


@prompt_app.command("list")
def prompt_list(application: ApplicationName = "qa") -> None:
    """Every version in the prompt registry, and how many exchanges met it."""
    from millrace.prompts.versions import list_versions

    with one_sentence():
        settings, declared = declaration(application)
        for one in list_versions(settings, declared):
            told = f"{one.created_at:%Y-%m-%d %H:%M} UTC  {one.exchanges} exchanges  registered by {one.registered_by}"
            console.print(f"{one.version:>4}  {told}", markup=False, soft_wrap=True)


@prompt_app.command("diff")
def prompt_diff(before: int, after: int, application: ApplicationName = "qa") -> None:
    """What changed from one version to another, line by line."""
    from millrace.prompts.versions import diff

    with one_sentence():
        settings, declared = declaration(application)
        changed = diff(settings, declared, before, after)
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
    from millrace.prompts.versions import read_template, template_of, try_template

    with one_sentence():
        settings, declared = declaration(application)
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
    from millrace.prompts.optimize import optimize_prompt, release_best

    with one_sentence():
        settings, declared = declaration(application)
        run = f"millrace prompt optimize by {getpass.getuser()}"
        result = optimize_prompt(settings, declared, run=run, trials=trials, token_budget=token_budget)
        console.print(result["why"], markup=False, soft_wrap=True)
        form = {"trials": trials, "token_budget": token_budget}
        released = release_best(settings, declared, result=result, run=run, form=form)
        if released["version"]:
            made = f"{released['version']} ({released['release_id']}), with prompt version {released['prompt_version']}"
            console.print(f"Candidate {made}; {application}.evaluate_candidate is next.", markup=False, soft_wrap=True)
