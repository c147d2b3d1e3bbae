"""Staging's data: the sample that prod published, as it is there, beside what staging's own gateway brought.

It reads the sample's place in the lake with staging's credential, which reads nothing else of prod, and writes
staging's tables. What goes from the sample goes here with the next run. Who is in the sample, and what became of them
there, is `sample.py`'s business.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from millrace.applications import Application
from millrace.environments.sample import MARK, PROD
from millrace.errors import SampleError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.places import SAMPLE
from millrace.lakehouse.sampled import follow
from millrace.lakehouse.tables import (
    GOLD_EVALUATION_EXAMPLES,
    SILVER_DOCUMENTS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
    Table,
)
from millrace.settings import Settings

STAGING = "staging"


def copy_evaluation_sets(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Bring the evaluation sets of the sample; staging's own stay.

    Returns: `examples` brought now, `sets` that are here, `changed`.

    Raises:
        SampleError: this is not staging, or none were published.
        LakehouseError: a table can't be read or written.
    """
    sample, ours = _lakes(settings, application, GOLD_EVALUATION_EXAMPLES)
    names = GOLD_EVALUATION_EXAMPLES.rows_schema.names
    written = ours.merge(GOLD_EVALUATION_EXAMPLES, sample.read(GOLD_EVALUATION_EXAMPLES, names), run=run)
    sets = ours.read(GOLD_EVALUATION_EXAMPLES, ["evaluation_set"])["evaluation_set"].unique()
    return {"examples": written.inserted, "sets": len(sets), "changed": written.changed}


def copy_documents(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Make `silver/documents` equal to the sample's. Nothing is read where that is as before.

    Returns: `changed`; and where the sample was read, counts `inserted`, `updated`, `deleted`.

    Raises:
        SampleError: this is not staging, or nothing was published; staging's documents stay as they are.
        LakehouseError: a table can't be read or written.
    """
    tables = (SILVER_DOCUMENTS,)
    sample, ours = _lakes(settings, application, *tables)

    def copy() -> dict[str, Any]:
        written = ours.transform(SILVER_DOCUMENTS, as_they_are, SILVER_DOCUMENTS, run=run, origin=sample)
        return {"changed": written.changed, **written.counts}

    return follow(ours, sample, tables, copy, rule=_rule(sample, tables), run=run) or {"changed": False}


def as_they_are(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    return batches


def copy_exchanges(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Make the sampled rows of `silver/exchanges` and `silver/feedback` equal to the sample's; what staging's own
    gateway brought stays. Nothing is read where the sample is as before. It is held in memory.

    Returns: `changed`; and where the sample was read, `exchanges` in it and `deleted` rows.

    Raises:
        SampleError: this is not staging, or nothing was published; staging's rows stay as they are.
        LakehouseError: a table can't be read or written.
    """
    tables = (SILVER_FEEDBACK, SILVER_EXCHANGES)  # feedback first, as its own ingestion does it
    sample, ours = _lakes(settings, application, *tables)
    sampled = f"target.completion_id LIKE '{MARK}%'"

    def copy() -> dict[str, Any]:
        rows = [sample.read(table, table.rows_schema.names) for table in tables]
        written = [
            ours.merge(table, some, run=run, delete_unmatched=sampled) for table, some in zip(tables, rows, strict=True)
        ]
        return {
            "changed": any(one.changed for one in written),
            "exchanges": rows[1].num_rows,
            "deleted": sum(one.deleted for one in written),
        }

    return follow(ours, sample, tables, copy, rule=_rule(sample, tables), run=run) or {"changed": False}


def _lakes(settings: Settings, application: Application, *tables: Table) -> tuple[Lake, Lake]:
    """The sample's, to read, which has these tables; and staging's."""
    if settings.environment != STAGING:
        raise SampleError(
            f"{settings.environment} takes no sample of {PROD}: its tables would be replaced by a part of {PROD}'s; "
            f"only {STAGING} does (MILLRACE_ENVIRONMENT={STAGING})"
        )
    sample = Lake.of(settings, application.name, environment=SAMPLE)
    for table in tables:
        if not sample.exists(table):
            raise SampleError(
                f"{application.name}: {PROD} has published no {table.path} in {sample.uri(table)}; nothing was "
                f"changed; run {application.name}.publish_sample in {PROD} first, or correct where "
                f"{STAGING} looks for it"
            )
    return sample, Lake.of(settings, application.name)


def _rule(sample: Lake, tables: tuple[Table, ...]) -> str:
    """Of tables that were made anew, versions say nothing."""
    return f"copy-{content_hash(*(sample.made_as(table) for table in tables))[:16]}"
