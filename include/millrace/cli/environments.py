"""`millrace env`: what differs between two environments, and what this one says of itself."""

import getpass
import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from millrace.cli.terminal import console, group, one_sentence
from millrace.settings import read_settings

WIDEST = 1000

env_app = group("Environments: compare two of them, and write down what this one is.")


@env_app.command("diff")
def env_diff(
    left: Annotated[str, typer.Argument(help="dev, staging or prod.")],
    right: Annotated[str, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs: every part, whole.")] = False,
) -> None:
    """Code, settings, secrets, declarations, tables, models, prompts, permissions: read with this process' credential.

    What it may not read is named. Of secrets only whether they are equal is known. Permissions are compared for every
    wall; an administrator's MILLRACE_ACCESS_SECRETS lets them all be read.
    """
    from millrace.environments.difference import compare_environments

    with one_sentence():
        parts = compare_environments(read_settings(), left, right)
    if as_json:
        print(json.dumps([asdict(part) for part in parts], indent=1))
        return
    for part in parts:
        compared = f"{len(part.differences)} differ, {part.equal} are equal"
        whole = any(not one.name for one in part.unread)
        console.print(f"{part.name}: {'not compared' if whole else compared}", style="bold")
        whose: dict[str, list[str]] = {}
        for one in part.unread:
            whose.setdefault(one.why, []).append(one.environment)
        for why, environments in whose.items():
            told = f"  {' and '.join(environments)} can't be read: {why}"
            console.print(told, markup=False, soft_wrap=True, style="yellow")
        if part.differences:
            table = Table("  ", "", left, right, box=None, pad_edge=False)
            for difference in part.differences:
                table.add_row("", difference.name, difference.left or "-", difference.right or "-")
            console.print(table, width=WIDEST, crop=False)


@env_app.command("record")
def env_record() -> None:
    """Write down what this environment is, where others can read it; maintain_lakehouse does it every night."""
    from millrace.environments.description import record_description

    with one_sentence():
        settings = read_settings()
        found = record_description(settings, run=f"millrace env record by {getpass.getuser()}")
        told = f"{settings.environment}, commit {found.commit or 'unknown'}: {len(found.settings)} settings"
        console.print(f"{told}, {len(found.secrets)} secrets.", markup=False)
