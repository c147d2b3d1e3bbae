"""Who may do what on one Qdrant server that the environments share: collections, and the tokens that open them.

A token is a JWT that the server's API key signs (HS256), for the collections of its identity (`rw`) and of those that
it reads (`r`), until it expires; it may create and delete no collection. So the declared ones are created here, with
the API key, which no process needs. Qdrant keeps no list of tokens: one ends by its `exp`, or all with the API key.
A new lineage is a new collection and needs new tokens.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import jwt

from millrace.applications import load_applications
from millrace.environments.access.matrix import READS, Held, Holding, right
from millrace.errors import AccessError
from millrace.retrieval.embed import lineage_id
from millrace.retrieval.server import Server, connect
from millrace.retrieval.service import ServiceBuilds, collected_lineages, collection_name
from millrace.settings import Settings

LETTERS = {"manages": "rw", "reads": "r"}
"""What may be done → as a token says it."""
LEAST_KEY = 32
"""Bytes of an API key that signs: whoever holds a token could find a shorter one by guessing."""


@dataclass(frozen=True)
class Change:
    """A collection that is declared and not there."""

    collection: str

    def __str__(self) -> str:
        return f"create collection {self.collection}"


def declared_collections(settings: Settings) -> dict[str, str]:
    """Collection of each declared application's lineage in each environment → the environment."""
    declared = [(application.name, lineage_id(application)) for application in load_applications(settings)]
    return {
        collection_name(environment, application, lineage): environment
        for environment in READS
        for application, lineage in declared
    }


def plan(settings: Settings, server: Server) -> list[Change]:
    """What is to be created before every environment can build; nothing: all is there.

    Args:
        server: asked with its API key.

    Raises:
        RetrievalError: it doesn't answer, or refuses the key.
    """
    there = _there(settings, server)
    return [Change(name) for name in declared_collections(settings) if name not in there]


def apply(settings: Settings, server: Server) -> list[Change]:
    """Create them. Killed anywhere, the next call does the rest.

    Raises:
        RetrievalError: as `plan`.
    """
    changes = plan(settings, server)
    for change in changes:
        ServiceBuilds(server, change.collection).prepare()
    return changes


def known_collections(settings: Settings, server: Server) -> dict[str, str]:
    """Declared collections and those of other lineages on the server, that candidates brought → the environment."""
    return declared_collections(settings) | _there(settings, server)


def claims(identity: str, collections: dict[str, str], *, until: datetime) -> dict[str, Any]:
    """What a token says.

    Args:
        collections: as `known_collections` returns them.
        until: when it ends.
    """
    may = {name: right(identity, environment) for name, environment in collections.items()}
    access = [{"collection": name, "access": LETTERS[given]} for name, given in sorted(may.items()) if given]
    return {"subject": identity, "exp": int(until.timestamp()), "access": access}


def held(settings: Settings, environment: str) -> Holding:
    """What the caller's own token or key opens of the environment's collections. The server knows of no other.

    Raises:
        RetrievalError: it doesn't answer, or refuses the key.
    """
    key = settings.qdrant_api_key
    server, begin = connect(settings.qdrant_url, key), collection_name(environment, "", "").removesuffix("-")
    try:
        # Unverified here: the server is asked by this token whether it has each collection.
        said = jwt.decode(key.get_secret_value(), options={"verify_signature": False})
    except jwt.InvalidTokenError:
        said = {"subject": "who holds its API key" if key.get_secret_value() else "whoever reaches it", "access": "m"}
    access = said.get("access", [])
    if isinstance(access, str):  # on everything
        opens = dict.fromkeys(_of(settings, server, environment), access)
    else:
        opens = {one["collection"]: one["access"] for one in access if one["collection"].startswith(begin)}
        opens = {name: may for name, may in opens.items() if ServiceBuilds(server, name).exists()}
    words = {letters: word for word, letters in LETTERS.items()} | {"m": "manages"}
    rights = [
        Held(said.get("subject", "a token"), f"index {name.removeprefix(begin)}", words.get(may, may))
        for name, may in opens.items()
    ]
    return Holding(rights, "Qdrant keeps no list of tokens: what others' open is known to who signs them")


def token(identity: str, collections: dict[str, str], api_key: str, *, now: datetime, valid: timedelta) -> str:
    """A token for `identity`, to be set as its environment's `MILLRACE_QDRANT_API_KEY`.

    Raises:
        AccessError: there is no such identity, nothing that it could open, or the key is too short to sign.
    """
    if identity not in READS:
        raise AccessError(f"there is no identity {identity!r}; there are {', '.join(READS)}")
    if not collections:
        raise AccessError("no application is declared, so there is no collection that a token could open")
    if len(api_key.encode()) < LEAST_KEY:
        raise AccessError(
            f"Qdrant's API key has {len(api_key.encode())} bytes, and whoever holds a token that it signs could guess "
            f"it; give the server one of at least {LEAST_KEY} (`openssl rand -hex 32`)"
        )
    return jwt.encode(claims(identity, collections, until=now + valid), api_key, algorithm="HS256")


def _there(settings: Settings, server: Server) -> dict[str, str]:
    """Collection of a declared application, on the server → the environment."""
    return {collection: environment for environment in READS for collection in _of(settings, server, environment)}


def _of(settings: Settings, server: Server, environment: str) -> list[str]:
    """Collections of declared applications in the environment, on the server."""
    return [
        collection_name(environment, application.name, lineage)
        for application in load_applications(settings)
        for lineage in collected_lineages(server, environment, application.name)
    ]
