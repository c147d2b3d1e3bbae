"""Staging's data: a sample of prod's, taken row by row by a hash, with nobody's name in it.

It reads prod's tables with staging's credential and writes staging's. Who is in is decided by the row's key and
stratum alone (`[sample]` of the declaration), so that every run, on every machine, takes the same rows. Whatever could
lead to a person or be used in prod is made staging's own: pseudonyms and completion ids are hashed again with staging's
key, free text is scrubbed (`scrub.py`), versions of releases and prompts are marked as prod's. What goes in prod goes
here with the next run. It knows no schedule.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.environments.scrub import Scrubber
from millrace.errors import SampleError, SettingsError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.sampled import SAMPLED, note_versions, versions_read
from millrace.lakehouse.tables import (
    GOLD_EVALUATION_EXAMPLES,
    SILVER_DOCUMENTS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
    Table,
)
from millrace.policies import Sample
from millrace.settings import Settings
from millrace.sources.pseudonym import pseudonym

STAGING = "staging"
RATINGS = BAD, GOOD, NONE = ("rating/bad", "rating/good", "rating/none")
"""Strata of exchanges."""
MARK = "sample-"
"""How the completion ids of sampled rows begin; those that staging's own gateway issues don't."""
FREE_TEXT = ("question", "answer", "error", "comment", "correction")
OF_PROD = ("release_version", "prompt_version", "rollout_id")
"""Numbers and names that mean another thing in staging."""


def sample_evaluation_sets(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Bring prod's evaluation sets, each whole: a part of one would be another set. They hold nothing of users.

    Returns: `examples` brought now, `sets` that are here, `changed`.

    Raises:
        SampleError: this is not staging.
        LakehouseError: a table can't be read or written.
    """
    theirs, ours = _lakes(settings, application)
    names = GOLD_EVALUATION_EXAMPLES.rows_schema.names
    written = ours.merge(GOLD_EVALUATION_EXAMPLES, theirs.read(GOLD_EVALUATION_EXAMPLES, names), run=run)
    sets = ours.read(GOLD_EVALUATION_EXAMPLES, ["evaluation_set"])["evaluation_set"].unique()
    return {"examples": written.inserted, "sets": len(sets), "changed": written.changed}


def sample_documents(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Make `silver/documents` equal to the sample of prod's, and all documents that prod's evaluation sets ask about:
    without those, no release here could answer them. Nothing is read where prod's table and the rule are as before.

    Returns: counts `inserted`, `updated`, `deleted`, `changed`.

    Raises:
        SampleError: this is not staging, or prod has no documents; staging's stay as they are.
        LakehouseError: a table can't be read or written.
    """
    theirs, ours = _lakes(settings, application)
    asked = theirs.read(GOLD_EVALUATION_EXAMPLES, ["document_id"])["document_id"]
    needed = frozenset(asked.to_pylist())
    rule = _rule(application.sample, *sorted(needed))
    tables = (SILVER_DOCUMENTS,)
    versions = _versions(theirs, tables)
    if versions == (None,):
        raise SampleError(
            f"{application.name}: {SAMPLED} has no {SILVER_DOCUMENTS.path} in {theirs.uri(SILVER_DOCUMENTS)}; nothing "
            f"was changed; run {application.name}.ingest_documents there first, or correct where staging looks for it"
        )
    if _is_known(ours, rule, tables, versions):
        return {"inserted": 0, "updated": 0, "deleted": 0, "changed": False}
    function = partial(documents_taken, sample=application.sample, needed=needed)
    written = ours.transform(SILVER_DOCUMENTS, function, SILVER_DOCUMENTS, run=run, origin=theirs)
    note_versions(ours, rule, tables, versions, run=run)
    return {
        "inserted": written.inserted,
        "updated": written.updated,
        "deleted": written.deleted,
        "changed": written.changed,
    }


def documents_taken(
    batches: Iterator[pa.RecordBatch], sample: Sample, needed: frozenset[str]
) -> Iterator[pa.RecordBatch]:
    """Of rows of `silver/documents` those that are in the sample, a batch for a batch."""
    for batch in batches:
        columns = (batch[name].to_pylist() for name in ("document_id", "section", "source"))
        mask = [
            key in needed or sample.takes(key, f"section/{section}" if section else f"source/{source}")
            for key, section, source in zip(*columns, strict=True)
        ]
        yield batch.filter(pa.array(mask, pa.bool_()))


def sample_exchanges(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Make the sampled rows of `silver/exchanges` and `silver/feedback` equal to the sample of prod's, an exchange and
    its feedback both or neither; what staging's own gateway brought stays. Nothing is read where prod's tables and the
    rule are as before. The sample is held in memory, prod's tables are not.

    Returns: `changed`; and where prod was read, `exchanges` in the sample, `strata` (stratum → how many of them, of how
        many in prod), `deleted` rows.

    Raises:
        SampleError: this is not staging.
        SettingsError: staging has no pseudonym key of its own.
        LakehouseError: a table can't be read or written.
    """
    theirs, ours = _lakes(settings, application)
    key = settings.pseudonym_key.get_secret_value().encode()
    if not key:
        raise SettingsError("MILLRACE_PSEUDONYM_KEY is empty; set one that prod doesn't have, and keep it")
    sample = application.sample
    tables = (SILVER_EXCHANGES, SILVER_FEEDBACK)
    rule = _rule(sample, pseudonym(key, "rule"))
    versions = _versions(theirs, tables)
    if _is_known(ours, rule, tables, versions):
        return {"changed": False}
    taken, strata = _taken(theirs, sample)
    own = partial(_made_own, key=key, scrub=Scrubber(sample.phone_regions))
    written = {}
    # Feedback first, as its own ingestion does it.
    for table in (SILVER_FEEDBACK, SILVER_EXCHANGES):
        rows = [own(row) for row in _rows(theirs, table, taken)]
        written[table.name] = ours.merge(
            table,
            pa.Table.from_pylist(rows, schema=table.rows_schema),
            run=run,
            delete_unmatched=f"target.completion_id LIKE '{MARK}%'",
        )
    note_versions(ours, rule, tables, versions, run=run)
    return {
        "exchanges": len(taken),
        "strata": {name: list(strata[name]) for name in RATINGS},
        "deleted": sum(one.deleted for one in written.values()),
        "changed": any(one.changed for one in written.values()),
    }


def _lakes(settings: Settings, application: Application) -> tuple[Lake, Lake]:
    """Prod's, to read, and staging's."""
    if settings.environment != STAGING:
        raise SampleError(
            f"{settings.environment} takes no sample of {SAMPLED}: its tables would be replaced by a part of "
            f"{SAMPLED}'s; only {STAGING} does (MILLRACE_ENVIRONMENT={STAGING})"
        )
    return Lake.of(settings, application.name, environment=SAMPLED), Lake.of(settings, application.name)


def _rule(sample: Sample, *more: str) -> str:
    """Name of all that decides which rows are in and what becomes of them."""
    return f"sample-{content_hash(json.dumps(sample.model_dump(mode='json'), sort_keys=True), *more)[:16]}"


def _versions(lake: Lake, tables: tuple[Table, ...]) -> tuple[int | None, ...]:
    return tuple(lake.version(table) for table in tables)


def _is_known(ours: Lake, rule: str, tables: tuple[Table, ...], versions: tuple[int | None, ...]) -> bool:
    """Whether these tables are here, as the sample of those versions."""
    return versions == versions_read(ours, rule, tables) and all(ours.exists(table) for table in tables)


def _taken(theirs: Lake, sample: Sample) -> tuple[set[str], dict[str, tuple[int, int]]]:
    """Ids of the exchanges in the sample; and by stratum how many these are, of how many."""
    ratings: dict[str, str] = {}
    there: Counter[str] = Counter()
    for batch in theirs.batches(SILVER_FEEDBACK, ["completion_id", "rating"]):
        for completion, rating in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            stratum = BAD if rating < 0.5 else GOOD
            there[stratum] += 1
            if sample.takes(completion, *RATINGS):  # The others' are nobody's business here.
                ratings[completion] = stratum
    taken: set[str] = set()
    found: Counter[str] = Counter()
    exchanges = 0
    for batch in theirs.batches(SILVER_EXCHANGES, ["completion_id"]):
        exchanges += batch.num_rows
        for completion in batch["completion_id"].to_pylist():
            stratum = ratings.get(completion, NONE)
            if sample.takes(completion, stratum):
                taken.add(completion)
                found[stratum] += 1
    there[NONE] = exchanges - there.total()
    return taken, {stratum: (found[stratum], there[stratum]) for stratum in RATINGS}


def _rows(theirs: Lake, table: Table, taken: set[str]) -> Iterator[dict[str, Any]]:
    wanted = pa.array(sorted(taken), pa.string())
    for batch in theirs.batches(table, table.rows_schema.names):
        yield from batch.filter(pc.is_in(batch["completion_id"], value_set=wanted)).to_pylist()


def _made_own(row: dict[str, Any], key: bytes, scrub: Scrubber) -> dict[str, Any]:
    """A row of prod's as staging may have it: nothing in it can be traced to a person, or rated in prod."""
    made = row | {
        "completion_id": f"{MARK}{pseudonym(key, row['completion_id'])}",
        "user": pseudonym(key, row["user"]),
        **{name: scrub(row[name]) for name in FREE_TEXT if name in row},
        **{name: row[name] and f"{SAMPLED}/{row[name]}" for name in OF_PROD if name in row},
    }
    del made["content_hash"]
    return made | {"content_hash": content_hash(json.dumps(made, sort_keys=True, default=str))}
