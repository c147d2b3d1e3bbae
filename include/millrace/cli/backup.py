"""`millrace backup` and `millrace restore`: everything that a deployment keeps, saved while it runs, and back again."""

from pathlib import Path
from typing import Annotated

import typer

from millrace.cli.terminal import console, one_sentence
from millrace.settings import read_settings


def backup_command(
    to: Annotated[Path, typer.Argument(help="A folder of backups: new, empty, or one that has some.")],
    secrets: Annotated[
        bool, typer.Option("--secrets", help="With the keys of the home, for whoever can read the folder.")
    ] = False,
    keep: Annotated[int | None, typer.Option(min=1, help="Remove all but the newest so many; empty: none.")] = None,
) -> None:
    """Save this deployment while it runs: databases, tables, models, index builds, events. docs/backup.md says more.

    Bytes that the folder has already are not written again.
    """
    from millrace.stack.backup import save

    with one_sentence():
        saved = save(read_settings(), to, secrets=secrets, keep=keep)
    manifest = saved.manifest
    told = [
        f"Backup {saved.name} of {manifest.environment} in {to}: {_size(manifest.bytes)}, of which "
        f"{_size(saved.written)} are new; {len(manifest.tables)} tables, "
        f"databases {', '.join(manifest.parts.get('databases', {})) or 'none'}."
    ]
    told += [f"Removed: {name}." for name in saved.removed]
    told += [f"Older ones were kept: {saved.stayed}."] if saved.stayed else []
    told += [f"Not in it: {what}." for what in saved.missing]
    console.print("\n".join(told), markup=False, soft_wrap=True)


def restore_command(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="The folder of backups.")],
    backup: Annotated[str, typer.Option(help="Which one, by its name; empty: the newest.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Read every byte of it and write nothing.")] = False,
) -> None:
    """Restore a backup to an empty home, and to empty databases and buckets. Interrupted, repeat it."""
    from millrace.stack.backup import restore, verify

    with one_sentence():
        if check:
            name, manifest = verify(source, backup)
            console.print(
                f"Backup {name} of {manifest.environment} is whole: {_size(manifest.bytes)}, every byte read.",
                markup=False,
                soft_wrap=True,
            )
            return
        settings = read_settings()
        restored = restore(settings, source, backup)
    told = [f"{settings.home} is restored from backup {restored.name}. Start it: millrace up"]
    if not restored.secrets:
        told.append(
            "The backup is without keys. Unless your environment sets them, put the old secrets.json into "
            f"{settings.home} first: what is stored, and what Airflow encrypted, can't be used with other keys."
        )
    console.print("\n".join(told), markup=False, soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
