"""The object store as parts of the stack: the server, and its users, bucket and walls, made once it answers.

`python -m millrace.stack.object_store` makes them, and changes nothing where they are there. Everybody who can read the
home can read every environment's key: walls on one machine, held by the server, for whoever comes with a key alone.
"""

import secrets
import sys
from pathlib import Path

from millrace.environments.access.mlflow_wall import READS
from millrace.errors import MillraceError
from millrace.lakehouse.storage import own_key, own_store
from millrace.private_files import write_private
from millrace.settings import Settings, read_settings
from millrace.stack.environment import part_environment
from millrace.stack.part import Part
from millrace.stack.versitygw import Versitygw

WALLED = "object-store-walls"
"""The part after which the lake can be used."""


def object_store_parts(settings: Settings) -> list[Part]:
    """In the order in which they start. Makes the keys where they are missing.

    Raises:
        StackError: the server can't be built.
    """
    server = _server(settings)
    server.prepare()
    for identity in READS:
        _make_key(own_store(settings) / "keys" / identity)
    environment = part_environment(settings, threads=1, keys=False)
    return [
        Part(
            name="object-store",
            command=server.command(settings.cache),
            environment=environment | server.environment(),
            ready=lambda started: server.answers(),
            url=server.url,
        ),
        Part(
            name=WALLED,
            command=(sys.executable, "-m", "millrace.stack.object_store"),
            environment=environment,
            ready=lambda started: False,
            after=("object-store",),
            once=True,
        ),
    ]


def main() -> None:
    # It imports AWS's client, which the stack itself needs nowhere.
    from millrace.environments.access import lake_wall
    from millrace.environments.access.walls import record_changes

    try:
        settings = read_settings()
        server = _server(settings)
        for identity in READS:
            server.create_user(own_key(settings, identity))
        known = settings.model_copy(update={"lake_endpoint": server.url})
        changes = lake_wall.apply(known, server.root, {identity: identity for identity in READS})
        record_changes(known, "lake", [str(one) for one in changes], actor="service/stack", outcome="changed")
    except MillraceError as error:
        sys.exit(str(error))


def _server(settings: Settings) -> Versitygw:
    return Versitygw(own_store(settings), settings.object_store_port, settings.host)


def _make_key(path: Path) -> None:
    path.parent.mkdir(exist_ok=True, mode=0o700)
    if not path.exists():
        write_private(path, secrets.token_urlsafe(30))


if __name__ == "__main__":
    main()
