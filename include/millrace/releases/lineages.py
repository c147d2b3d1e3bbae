"""Which lineages of vectors releases search, and these kept up to date with the documents."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.lakehouse.trained import EMBEDDING_TAG
from millrace.releases.embedding import release_lineage
from millrace.releases.package import read_release
from millrace.releases.published_split import read_aliases, read_split
from millrace.releases.registry import fetch_release, release_manifest, young_candidates
from millrace.retrieval.embed import Lineage, declared_lineage, lineage_name, refresh_embeddings
from millrace.retrieval.embedding_model import weights_sha256
from millrace.retrieval.index import build_index
from millrace.retrieval.reembed import reembed
from millrace.settings import Settings

log = logging.getLogger("millrace.releases")


def searched_lineages(settings: Settings, application: Application) -> list[Lineage]:
    """Of every release that users can meet, and of candidates that they may meet soon: those that are no older than
    upkeep lets an unused release become. The declared lineage is among them unless the champion's embedding model is a
    fine-tuned one, and no such candidate has another: then nobody needs it.

    Raises:
        ReleaseError: MLflow doesn't answer.
        RetrievalError: the declared embedding model isn't installed.
    """
    split = read_split(settings, application.name)
    champion = split.champion if split else None
    live = {*read_aliases(settings, application.name).values(), *filter(None, [champion])}
    left_behind = False
    if champion:
        since = datetime.now(UTC) - timedelta(days=application.retention.unused_releases)
        young = young_candidates(settings, application, champion, since)
        tuned = {version for version, tags in young.items() if EMBEDDING_TAG in tags}
        left_behind = release_manifest(settings, application, champion).retrieval.tuned != () and tuned == young.keys()
        live |= tuned  # the others search the declared lineage
    found: dict[str, Lineage] = {}
    for version in sorted(live, key=int):
        folder = fetch_release(settings, application, version)
        lineage = release_lineage(read_release(folder), folder)
        found.setdefault(lineage.id, lineage)
    if not left_behind:
        declared = declared_lineage(application)
        found.setdefault(declared.id, declared)
    return list(found.values())


def embed_changes(
    settings: Settings, application: Application, *, run: str, distrust: bool = False
) -> list[dict[str, Any]]:
    """`refresh_embeddings` (`distrust`: `reembed`) of every lineage that is searched and made as chunks are cut now: an
    older chunker's stays as it is.

    Returns: what became of each.

    Raises:
        MillraceError: as these and `searched_lineages`.
    """
    stage = reembed if distrust else refresh_embeddings
    return [
        stage(settings, application, run=run, lineage=lineage)
        for lineage in searched_lineages(settings, application)
        if _grows(application, lineage)
    ]


def build_indexes(
    settings: Settings, application: Application, embedded: list[dict[str, Any]], *, run: str
) -> list[dict[str, Any]]:
    """`build_index` of what `embed_changes` has brought up to date."""
    return [build_index(settings, application, run=run, lineage=one["lineage"]) for one in embedded]


def _grows(application: Application, lineage: Lineage) -> bool:
    try:
        sha256 = weights_sha256(lineage.tuned) if lineage.tuned else None
        return lineage_name(lineage.model, application.chunking, sha256) == lineage.id
    except RetrievalError as error:
        log.warning("lineage %s stays as it is: %s", lineage.id, error)
        return False
