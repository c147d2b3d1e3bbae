"""`millrace erase`: a person's right to be forgotten."""

import getpass
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import SecretStr

from millrace.applications import load_application, load_applications
from millrace.cli.terminal import console, one_sentence
from millrace.errors import ErasureError
from millrace.settings import Settings, read_settings
from millrace.sources.pseudonym import noted_in, pseudonym, require_same_key
from millrace.stack.home import obtain_secrets

if TYPE_CHECKING:
    from millrace.environments.erasure import Report

PSEUDONYM = re.compile(r"[0-9a-f]{32}")


def erase_command(
    user: Annotated[str, typer.Argument(help="As applications name this user to the gateway.")],
    application: Annotated[str, typer.Option("--application", "-a", help="Empty: all of this environment.")] = "",
    is_pseudonym: Annotated[bool, typer.Option("--pseudonym", help="USER is the pseudonym already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask before erasing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Erase what a user asked, got and said in this environment, and name the releases that learnt from it.

    The exit status is 0 only if nothing is left, or with --dry-run if that could be said.
    """
    from millrace.environments.erasure import erase, preview

    with one_sentence():
        settings = read_settings()
        settings = _with_key(settings)
        name = _pseudonym(settings, user, is_pseudonym)
        ours = [load_application(settings, application)] if application else load_applications(settings)
        found = [preview(settings, one, name) for one in ours]
        if not dry_run:
            if not yes:
                _show(found, "There is")
                typer.confirm(f"Erase all of this of user {name} in {settings.environment}?", abort=True)
            actor = f"person/{getpass.getuser()}"
            found = [erase(settings, one, name, actor=actor, run=actor) for one in ours]
    if as_json:
        print(json.dumps([asdict(report) for report in found], indent=1))
    else:
        _show(found, "There is" if dry_run else "Erased")
    if not dry_run and not all(report.erased for report in found):
        raise typer.Exit(1)


def _with_key(settings: Settings) -> Settings:
    """`settings` with the key of pseudonyms that its home has, unless the environment sets one."""
    if settings.pseudonym_key.get_secret_value() or not (settings.home / "secrets.json").exists():
        return settings
    key = SecretStr(obtain_secrets(settings.home).pseudonym_key)
    return settings.model_copy(update={"pseudonym_key": key})


def _pseudonym(settings: Settings, user: str, is_pseudonym: bool) -> str:
    """Raises:
    ErasureError: it is none, or there is no key to make it with.
    SettingsError: the key is another than the gateway's.
    """
    if is_pseudonym:
        if not PSEUDONYM.fullmatch(user):
            raise ErasureError(f"{user!r} is no pseudonym, which is 32 hexadecimal digits; leave --pseudonym out")
        return user
    key = settings.pseudonym_key.get_secret_value()
    if not key:
        raise ErasureError(
            f"there is no key to make pseudonyms with in {settings.home}; set MILLRACE_PSEUDONYM_KEY to the gateway's, "
            "or give the pseudonym with --pseudonym"
        )
    require_same_key(key.encode(), noted_in(settings))
    return pseudonym(key.encode(), user)


def _show(reports: "list[Report]", word: str) -> None:
    for report in reports:
        counts = {"lines of the event log": report.lines} | dict(report.rows)
        counts |= {"files of fine-tunes": report.files, "traces in MLflow": report.traces}
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "nothing"
        console.print(f"{report.application}: user {report.user}. {word}: {told}.", markup=False, soft_wrap=True)
        if report.trained:
            learnt = ", ".join(f"{report.application}@{version}" for version in report.trained)
            console.print(
                f"  Learnt from it: {learnt}; they stay, and the next fine-tune learns nothing of it.",
                markup=False,
                soft_wrap=True,
            )
        for path, why in report.waiting.items():
            console.print(
                f"  The bytes of old versions of {path} stay: {why}; {report.application}.maintain_lakehouse removes "
                "them when it has, at the latest after a week.",
                markup=False,
                soft_wrap=True,
            )
