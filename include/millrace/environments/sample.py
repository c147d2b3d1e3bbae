"""What prod shows staging of its tables: a sample, taken row by row by a hash, with nobody's name in it.

Prod's identity takes it and writes it to a place of its own beside the environments (`lakehouse/places.py`), which is
all that staging's credential reads of prod. Who is in is decided by the row's key and stratum alone (`[sample]` of the
declaration), so that every run, on every machine, takes the same rows. Whatever could lead to a person or be used in
prod is made another: pseudonyms and completion ids are hashed again, with a key that prod alone can make; free text is
scrubbed (`scrub.py`), versions of releases and prompts are marked as prod's. What goes in prod goes here with the next
run. It knows no schedule, and not what staging does with it (`sample_copy.py`).
"""

import hashlib
import hmac
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
from millrace.lakehouse.places import OWNERS, SAMPLE
from millrace.lakehouse.sampled import follow
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

PROD = OWNERS[SAMPLE]
RATINGS = BAD, GOOD, NONE = ("rating/bad", "rating/good", "rating/none")
"""Strata of exchanges."""
MARK = "sample-"
"""How the completion ids of sampled rows begin; those that a gateway issues don't."""
FREE_TEXT = ("question", "answer", "error", "comment", "correction")
OF_PROD = ("release_version", "prompt_version", "rollout_id")
"""Numbers and names that mean another thing in staging."""


def publish_evaluation_sets(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Publish prod's evaluation sets, each whole: a part of one would be another set. They hold nothing of users.

    Returns: `examples` published now, `changed`.

    Raises:
        SampleError: this is not prod.
        LakehouseError: a table can't be read or written.
    """
    prod, sample = _lakes(settings, application)
    names = GOLD_EVALUATION_EXAMPLES.rows_schema.names
    written = sample.merge(GOLD_EVALUATION_EXAMPLES, prod.read(GOLD_EVALUATION_EXAMPLES, names), run=run)
    return {"examples": written.inserted, "changed": written.changed}


def publish_documents(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Publish the sample of `silver/documents`, and all documents that the evaluation sets ask about: without those, no
    release of staging could answer them. Nothing is read where the table and the rule are as before.

    Returns: `changed`; and where the table was read, counts `inserted`, `updated`, `deleted`.

    Raises:
        SampleError: this is not prod, or it has no documents; what is published stays as it is.
        LakehouseError: a table can't be read or written.
    """
    prod, sample = _lakes(settings, application)
    asked = prod.read(GOLD_EVALUATION_EXAMPLES, ["document_id"])["document_id"]
    needed = frozenset(asked.to_pylist())
    if not prod.exists(SILVER_DOCUMENTS):
        raise SampleError(
            f"{application.name}: {PROD} has no {SILVER_DOCUMENTS.path} in {prod.uri(SILVER_DOCUMENTS)}; nothing was "
            f"published; run {application.name}.ingest_documents first"
        )
    function = partial(documents_taken, sample=application.sample, needed=needed)

    def publish() -> dict[str, Any]:
        written = sample.transform(SILVER_DOCUMENTS, function, SILVER_DOCUMENTS, run=run, origin=prod)
        return {"changed": written.changed, **written.counts}

    rule = _rule(application.sample, *sorted(needed))
    return follow(sample, prod, (SILVER_DOCUMENTS,), publish, rule=rule, run=run) or {"changed": False}


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


def publish_exchanges(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Publish the sample of `silver/exchanges` and `silver/feedback`, an exchange and its feedback both or neither.
    Nothing is read where the tables and the rule are as before. The sample is held in memory, prod's tables are not.

    Returns: `changed`; and where the tables were read, `exchanges` in the sample, `strata` (stratum → how many of them,
        of how many in prod), `deleted` rows.

    Raises:
        SampleError: this is not prod.
        SettingsError: the pseudonym key is missing.
        LakehouseError: a table can't be read or written.
    """
    prod, sample = _lakes(settings, application)
    key = _key(settings)
    policy = application.sample
    tables = (SILVER_FEEDBACK, SILVER_EXCHANGES)  # feedback first, as its own ingestion does it
    shown = partial(_shown, key=key, scrub=Scrubber(policy.phone_regions))

    def publish() -> dict[str, Any]:
        taken, strata = _taken(prod, policy)
        written = []
        for table in tables:
            rows = [shown(row) for row in _rows(prod, table, taken)]
            published = pa.Table.from_pylist(rows, schema=table.rows_schema)
            written.append(sample.merge(table, published, run=run, delete_unmatched="true"))
        return {
            "changed": any(one.changed for one in written),
            "exchanges": len(taken),
            "strata": {name: list(strata[name]) for name in RATINGS},
            "deleted": sum(one.deleted for one in written),
        }

    rule = _rule(policy, pseudonym(key, "rule"))
    return follow(sample, prod, tables, publish, rule=rule, run=run) or {"changed": False}


def _lakes(settings: Settings, application: Application) -> tuple[Lake, Lake]:
    """Prod's, to read, and the sample's."""
    if settings.environment != PROD:
        raise SampleError(
            f"{settings.environment} publishes no sample: what staging reads is {PROD}'s; only {PROD} does "
            f"(MILLRACE_ENVIRONMENT={PROD})"
        )
    return Lake.of(settings, application.name), Lake.of(settings, application.name, environment=SAMPLE)


def _key(settings: Settings) -> bytes:
    """With which users and completions are hashed again. It is no pseudonym of anybody's (those are of SHA-256), so it
    is in no table, whatever name a user gives."""
    key = settings.pseudonym_key.get_secret_value().encode()
    if not key:
        raise SettingsError("MILLRACE_PSEUDONYM_KEY is empty; set the one that this environment's gateway has")
    return hmac.digest(key, SAMPLE.encode(), hashlib.sha512)


def _rule(sample: Sample, *more: str) -> str:
    """Name of all that decides which rows are in and what becomes of them."""
    return f"sample-{content_hash(json.dumps(sample.model_dump(mode='json'), sort_keys=True), *more)[:16]}"


def _taken(prod: Lake, sample: Sample) -> tuple[set[str], dict[str, tuple[int, int]]]:
    """Ids of the exchanges in the sample; and by stratum how many these are, of how many."""
    ratings: dict[str, str] = {}
    there: Counter[str] = Counter()
    for batch in prod.batches(SILVER_FEEDBACK, ["completion_id", "rating"]):
        for completion, rating in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            stratum = BAD if rating < 0.5 else GOOD
            there[stratum] += 1
            if sample.takes(completion, *RATINGS):  # The others' are nobody's business here.
                ratings[completion] = stratum
    taken: set[str] = set()
    found: Counter[str] = Counter()
    exchanges = 0
    for batch in prod.batches(SILVER_EXCHANGES, ["completion_id"]):
        exchanges += batch.num_rows
        for completion in batch["completion_id"].to_pylist():
            stratum = ratings.get(completion, NONE)
            if sample.takes(completion, stratum):
                taken.add(completion)
                found[stratum] += 1
    there[NONE] = exchanges - there.total()
    return taken, {stratum: (found[stratum], there[stratum]) for stratum in RATINGS}


def _rows(prod: Lake, table: Table, taken: set[str]) -> Iterator[dict[str, Any]]:
    wanted = pa.array(sorted(taken), pa.string())
    for batch in prod.batches(table, table.rows_schema.names):
        yield from batch.filter(pc.is_in(batch["completion_id"], value_set=wanted)).to_pylist()


def _shown(row: dict[str, Any], key: bytes, scrub: Scrubber) -> dict[str, Any]:
    """A row of prod's as staging may read it: nothing in it can be traced to a person, or rated in prod."""
    made = row | {
        "completion_id": f"{MARK}{pseudonym(key, row['completion_id'])}",
        "user": pseudonym(key, row["user"]),
        **{name: scrub(row[name]) for name in FREE_TEXT if name in row},
        **{name: row[name] and f"{PROD}/{row[name]}" for name in OF_PROD if name in row},
    }
    del made["content_hash"]
    return made | {"content_hash": content_hash(json.dumps(made, sort_keys=True, default=str))}
