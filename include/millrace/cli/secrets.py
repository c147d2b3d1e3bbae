"""`millrace secret`: where secrets come from, and a new completion key."""

import getpass
import secrets
from datetime import timedelta
from typing import Annotated

import typer
from pydantic import SecretStr

from millrace.cli.terminal import console, group, one_sentence
from millrace.settings import Settings, read_settings
from millrace.sources.event_log import now

secret_app = group("Where secrets come from, and a new completion key.")

OVERLAP_DAYS = 8
"""A rating counts for seven days (`monitoring/windows.py`), and clocks differ."""


@secret_app.command("list")
def secret_list() -> None:
    """Every secret setting and where it comes from; never a secret."""
    from millrace.stack.rotation import COMPLETION_KEY, completion_keys, source

    with one_sentence():
        settings = read_settings()
        for name, field in Settings.model_fields.items():
            if field.annotation is SecretStr:
                console.print(f"{name}: {source(settings, name) or 'not set'}", markup=False, soft_wrap=True)
                for key in completion_keys(settings) if name == COMPLETION_KEY else ():
                    ends = f"until {key.until:%Y-%m-%d %H:%M} UTC" if key.until else "for ever"
                    console.print(f"  a key that verifies {ends}", markup=False)


@secret_app.command("rotate-completion-key")
def secret_rotate(
    overlap_days: Annotated[
        float, typer.Option(min=0, max=36_500, help="How long ids that the key before signed are still taken.")
    ] = OVERLAP_DAYS,
) -> None:
    """Sign completion ids with a new key from now on. Nothing is started anew, and no feedback is lost."""
    from millrace.stack.rotation import rotate_completion_key

    with one_sentence():
        rotated = rotate_completion_key(
            read_settings(),
            secrets.token_urlsafe(64),
            overlap=timedelta(days=overlap_days),
            actor=getpass.getuser(),
            now=now(),
        )
        console.print(
            f"A new completion key signs, in {rotated.kept}; ids of the one before are taken until "
            f"{rotated.until:%Y-%m-%d %H:%M} UTC.",
            markup=False,
            soft_wrap=True,
        )
