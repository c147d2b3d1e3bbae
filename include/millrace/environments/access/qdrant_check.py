"""What a Qdrant server lets each identity's token do, found out by trying it.

In every environment a probe stands for what is there: collection `millrace-<environment>-_platform-access`, made with
the server's API key before and removed after. Tokens say the same of it as of any other collection.
"""

import secrets
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from millrace.environments.access.matrix import READS, Observed, right
from millrace.environments.access.qdrant_wall import token
from millrace.errors import RetrievalError
from millrace.lakehouse.tables import PLATFORM
from millrace.retrieval.server import Server
from millrace.retrieval.service import collected_lineages, collection_name

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import VectorParams


class _Request(Protocol):
    def __call__(self, client: "QdrantClient", name: str) -> Any: ...


def _is_there(client: "QdrantClient", name: str) -> Any:
    return client.get_collection(name)


def _read(client: "QdrantClient", name: str) -> Any:
    return client.scroll(name, limit=1)


def _write(client: "QdrantClient", name: str) -> Any:
    from qdrant_client import models

    return client.upsert(name, [models.PointStruct(id=str(uuid.uuid4()), vector=[1.0], payload={})], wait=True)


def _delete_points(client: "QdrantClient", name: str) -> Any:
    from qdrant_client import models

    return client.delete(name, models.FilterSelector(filter=models.Filter(must=[])), wait=True)


def _index(client: "QdrantClient", name: str) -> Any:
    from qdrant_client import models

    return client.create_payload_index(name, "tried", models.PayloadSchemaType.KEYWORD, wait=True)


def _create(client: "QdrantClient", name: str) -> Any:
    return client.create_collection(f"{name}-{uuid.uuid4().hex}", _vectors())


def _delete(client: "QdrantClient", name: str) -> Any:
    return client.delete_collection(name)


_ACTIONS: dict[str, tuple[_Request, frozenset[str]]] = {
    "see": (_is_there, frozenset({"manages", "reads"})),
    "read": (_read, frozenset({"manages", "reads"})),
    "write to": (_write, frozenset({"manages"})),
    "delete points of": (_delete_points, frozenset({"manages"})),
    "index": (_index, frozenset({"manages"})),
    "create another beside": (_create, frozenset()),
    "delete": (_delete, frozenset()),
}
"""Action on a collection → how it is tried, and the rights that allow it."""
_SHOWN = ("an expired token", "a token of another key", "no token")
"""What opens nothing, not even one's own collection."""


def declared() -> list[Observed]:
    """What `check` would try."""
    return [
        Observed(identity, environment, "collection", action, is_declared, None)
        for identity in READS
        for environment, action, is_declared in _promises(identity)
    ]


def check(administrator: Server, api_key: str, connect: Callable[[str], Server]) -> list[Observed]:
    """Every identity tries every action on every environment's probe.

    Args:
        administrator: the server, asked with its API key.
        api_key: that key, which signs tokens.
        connect: the server, asked with another key; empty: with none.

    Raises:
        RetrievalError: the server doesn't answer, or says neither yes nor no.
        AccessError: the key is too short to sign.
    """
    probes = {_probe(environment): environment for environment in READS}
    now = datetime.now(UTC)
    found = []
    try:
        for identity in READS:
            asked = _asked(identity, probes, api_key, connect, now)
            for environment, action, is_declared in _promises(identity):
                allowed = _allowed(asked, action, _made(administrator, environment))
                found.append(Observed(identity, environment, "collection", action, is_declared, allowed))
        return found
    finally:
        for environment in READS:
            for one in collected_lineages(administrator, environment, PLATFORM):
                name = collection_name(environment, PLATFORM, one)
                administrator.ask("delete a collection", partial(_delete, name=name))


def _asked(
    identity: str, probes: dict[str, str], api_key: str, connect: Callable[[str], Server], now: datetime
) -> dict[str, Server]:
    """The server, asked with the identity's token; and, by what else is shown, with that."""
    made = partial(token, identity, probes, valid=timedelta(minutes=10))
    shown = (made(api_key, now=now - timedelta(hours=1)), made(secrets.token_hex(), now=now), "")
    return {"": connect(made(api_key, now=now))} | dict(zip(_SHOWN, map(connect, shown), strict=True))


def _promises(identity: str) -> Iterator[tuple[str, str, bool]]:
    """Environment, action, and whether the identity may."""
    for environment in READS:
        for action, (_, rights) in _ACTIONS.items():
            yield environment, action, right(identity, environment) in rights
    for shown in _SHOWN:
        yield identity, f"read by {shown}", False


def _allowed(asked: dict[str, Server], action: str, probe: str) -> bool:
    """Whether the server does it.

    Raises:
        RetrievalError: it says neither yes nor no.
    """
    from qdrant_client.http.exceptions import UnexpectedResponse

    request, shown = (_read, action.removeprefix("read by ")) if action not in _ACTIONS else (_ACTIONS[action][0], "")
    try:
        asked[shown].ask(action, partial(request, name=probe), ())
    except RetrievalError as error:
        said = error.__cause__
        if isinstance(said, UnexpectedResponse) and said.status_code in (401, 403):
            return False
        raise
    return True


def _probe(environment: str) -> str:
    return collection_name(environment, PLATFORM, "access")


def _made(administrator: Server, environment: str) -> str:
    """The environment's probe, made where it is missing: somebody may have been let delete it."""
    name = _probe(environment)
    if not administrator.ask("see", lambda client: client.collection_exists(name)):
        administrator.ask("create", lambda client: client.create_collection(name, _vectors()))
    return name


def _vectors() -> "VectorParams":
    from qdrant_client import models

    return models.VectorParams(size=1, distance=models.Distance.DOT)
