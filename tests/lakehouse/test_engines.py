"""What both engines promise, held to the same results by the same tests."""

from datetime import UTC, date, datetime
from functools import partial

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.applications import Chunking
from millrace.errors import LakehouseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.storage import delta_options
from millrace.lakehouse.tables import SILVER_FEEDBACK, Table
from tests.lakehouse.things import (
    COUNTED,
    EVERYTHING,
    OTHER_THINGS,
    THINGS,
    doubled,
    failing,
    hashes,
    labelled,
    repeated,
    things,
    unfit,
)


def test_a_merge_inserts_new_keys_updates_changed_ones_and_leaves_the_rest(lake: Lake) -> None:
    first = lake.merge(THINGS, things({"a": "1", "b": "1"}), run="first")
    second = lake.merge(THINGS, things({"b": "2", "c": "1"}), run="second")
    assert (first.inserted, first.updated, first.deleted) == (2, 0, 0)
    assert (second.inserted, second.updated, second.deleted) == (1, 1, 0)
    assert second.version == lake.version(THINGS)
    rows = lake.read(THINGS)
    assert hashes(rows) == {"a": "1", "b": "2", "c": "1"}
    writers = dict(zip(rows["key"].to_pylist(), rows["written_by"].to_pylist(), strict=True))
    assert writers == {"a": "first", "b": "second", "c": "second"}


@pytest.mark.parametrize("delete_unmatched", [None, "true"])
def test_a_repeated_merge_commits_nothing(lake: Lake, delete_unmatched: str | None) -> None:
    rows = things({"a": "1", "b": "1"})
    version = lake.merge(THINGS, rows, run="first", delete_unmatched=delete_unmatched).version
    written = lake.merge(THINGS, rows, run="second", delete_unmatched=delete_unmatched)
    assert not written.changed
    assert written.version == version == lake.version(THINGS)


def test_unmatched_rows_are_deleted_only_where_the_condition_holds(lake: Lake) -> None:
    lake.merge(THINGS, things({"a": "1", "b": "1", "c": "1"}), run="r")
    written = lake.merge(THINGS, things({"a": "2"}), run="r", delete_unmatched="target.key >= 'c'")
    assert (written.inserted, written.updated, written.deleted) == (0, 1, 1)
    assert hashes(lake.read(THINGS)) == {"a": "2", "b": "1"}
    assert lake.merge(THINGS, things({}), run="r", delete_unmatched="true").deleted == 2
    assert lake.read(THINGS).num_rows == 0


def test_a_row_that_has_seen_fewer_events_never_replaces_one_that_has_seen_more(lake: Lake) -> None:
    def row(content: str, seen: int) -> pa.Table:
        return pa.table([["k"], [content], [seen]], schema=COUNTED.rows_schema)

    lake.merge(COUNTED, row("two events", 2), run="r")
    version = lake.version(COUNTED)
    assert not lake.merge(COUNTED, row("one event", 1), run="late").changed
    assert lake.version(COUNTED) == version
    assert lake.merge(COUNTED, row("two other events", 2), run="r").updated == 1


def test_every_type_reads_back_as_declared(lake: Lake) -> None:
    full = {
        "key": "ключ", "content_hash": "h", "user": "u'`\"\\", "position": -(2**62), "rating": 0.1,
        "simulated": True, "at": datetime(1666, 9, 2, 1, 2, 3, 456789, UTC), "date": date(2024, 2, 29),
        "content": b"\x00\xff", "vector": [1.5, -2.25], "citations": ["a", "b"],
    }  # fmt: skip
    empty = dict.fromkeys(full) | {"key": "k", "content_hash": "h", "date": date(1970, 1, 1), "citations": []}
    rows = pa.Table.from_pylist([full, empty], schema=EVERYTHING.rows_schema)
    lake.merge(EVERYTHING, rows, run="r")
    found = lake.read(EVERYTHING)
    assert found.schema == EVERYTHING.schema
    assert found.select(rows.schema.names).sort_by("date").to_pylist() == [empty, full]
    feed = lake.changes(EVERYTHING, 0)
    assert feed.schema == EVERYTHING.schema.append(pa.field("change", pa.string()))
    assert feed.select(rows.schema.names).sort_by("date").to_pylist() == [empty, full]
    later = rows.set_column(1, rows.schema.field("content_hash"), pa.array(["h2", "h2"]))
    assert lake.merge(EVERYTHING, later, run="r").updated == 2
    assert lake.read(EVERYTHING, columns=["key"], version=0).num_rows == 0


def test_a_broken_constraint_is_one_sentence_and_writes_nothing(lake: Lake) -> None:
    lake.merge(THINGS, things({"a": "1"}), run="r")
    version = lake.version(THINGS)
    with pytest.raises(LakehouseError, match=r"size_not_negative: size >= 0.*nothing was written"):
        lake.merge(THINGS, things({"b": "1"}, size=-1), run="r")
    assert lake.version(THINGS) == version
    assert hashes(lake.read(THINGS)) == {"a": "1"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (things({"a": "1"}).drop_columns(["size"]), "don't fit the declared schema"),
        (pa.concat_tables([things({"a": "1"})] * 2), "occurs twice"),
        (pa.table({"key": ["a"], "content_hash": pa.nulls(1, pa.string()), "size": [1]}), "must not be null"),
        (pa.table({"key": ["a"], "content_hash": ["1"], "size": ["many"]}), "don't fit the declared schema"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(lake: Lake, rows: pa.Table, said: str) -> None:
    with pytest.raises(LakehouseError, match=said):
        lake.merge(THINGS, rows, run="r")
    assert not lake.exists(THINGS)


def test_a_transformation_makes_its_table_follow_the_source(lake: Lake) -> None:
    lake.merge(THINGS, things({"a": "1", "b": "1"}, size=3), run="r")
    first = lake.transform(THINGS, doubled, OTHER_THINGS, run="t")
    assert (first.inserted, first.updated, first.deleted) == (2, 0, 0)
    assert set(lake.read(OTHER_THINGS)["size"].to_pylist()) == {6}
    lake.merge(THINGS, things({"a": "2", "c": "1"}), run="r", delete_unmatched="true")
    second = lake.transform(THINGS, doubled, OTHER_THINGS, run="t2")
    assert (second.inserted, second.updated, second.deleted) == (1, 1, 1)
    assert hashes(lake.read(OTHER_THINGS)) == {"a": "2x2", "c": "2x1"}
    version = lake.version(OTHER_THINGS)
    assert not lake.transform(THINGS, doubled, OTHER_THINGS, run="t3").changed
    assert lake.version(OTHER_THINGS) == version


def test_a_transformation_that_yields_nothing_empties_its_table(lake: Lake) -> None:
    lake.merge(OTHER_THINGS, things({"a": "1"}), run="r")
    lake.merge(THINGS, things({}), run="r")
    assert lake.transform(THINGS, doubled, OTHER_THINGS, run="t").deleted == 1


def test_a_transformation_takes_a_partial_of_a_function_and_a_frozen_declaration(lake: Lake) -> None:
    lake.merge(THINGS, things({"a": "1"}), run="r")
    lake.transform(THINGS, partial(labelled, chunking=Chunking(max_words=77)), OTHER_THINGS, run="t")
    assert hashes(lake.read(OTHER_THINGS)) == {"a": "77"}


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        (repeated, LakehouseError, "occurs twice"),
        (unfit, LakehouseError, "gold/other_things: rows don't fit the declared schema"),
        (failing, Exception, "the moon is in the wrong house"),
    ],
)
def test_a_transformation_that_fails_writes_nothing_and_says_why(
    lake: Lake, function: object, error: type[Exception], said: str
) -> None:
    lake.merge(THINGS, things({"a": "1"}), run="r")
    lake.merge(OTHER_THINGS, things({"z": "1"}), run="r")
    version = lake.version(OTHER_THINGS)
    with pytest.raises(error, match=said) as raised:
        lake.transform(THINGS, function, OTHER_THINGS, run="t")
    assert "\n" not in str(raised.value)
    assert lake.version(OTHER_THINGS) == version
    assert hashes(lake.read(OTHER_THINGS)) == {"z": "1"}


def test_a_transformation_without_its_source_is_refused_and_deletes_nothing(lake: Lake) -> None:
    lake.merge(OTHER_THINGS, things({"z": "1"}), run="r")
    with pytest.raises(LakehouseError, match=r"its source .* is not there"):
        lake.transform(THINGS, doubled, OTHER_THINGS, run="t")
    assert lake.read(OTHER_THINGS).num_rows == 1


def test_a_table_has_its_declared_properties_and_no_other_features(lake: Lake) -> None:
    lake.merge(SILVER_FEEDBACK, SILVER_FEEDBACK.rows_schema.empty_table(), run="r")
    uri = lake.uri(SILVER_FEEDBACK)
    opened = DeltaTable(uri, storage_options=delta_options(uri))
    configuration = opened.metadata().configuration
    assert configuration["delta.enableChangeDataFeed"] == "true"
    assert configuration["delta.logRetentionDuration"] == "interval 30 days"
    assert configuration["delta.constraints.rating_in_range"] == "rating >= 0 AND rating <= 1"
    assert opened.metadata().partition_columns == ["date"]
    not_null = {field.name for field in opened.schema().fields if not field.nullable}
    assert not_null == {field.name for field in SILVER_FEEDBACK.schema if not field.nullable}
    assert opened.protocol().min_reader_version == 1


@pytest.mark.slow
def test_checkpoints_are_readable_and_the_feed_reaches_over_them(lake: Lake) -> None:
    for i in range(12):
        lake.merge(THINGS, things({"a": str(i), f"k{i % 3}": str(i)}), run="r")
    assert hashes(lake.changes(THINGS, 2)) == hashes(lake.read(THINGS))


KEYS = st.sampled_from("abcd")
MERGES = st.lists(
    st.tuples(
        st.dictionaries(KEYS, st.sampled_from("123"), max_size=4),
        st.sampled_from([None, "true", "target.key >= 'c'"]),
    ),
    min_size=1,
    max_size=5,
)


def expected(state: dict[str, str], merged: dict[str, str], delete: str | None) -> dict[str, str]:
    """What a merge should leave, in five words of Python."""
    doomed = {"true": set(state), "target.key >= 'c'": {k for k in state if k >= "c"}, None: set()}[delete or None]
    return {key: value for key, value in state.items() if key not in doomed} | merged


def check_law(lake: Lake, table: Table, merges: list[tuple[dict[str, str], str | None]]) -> None:
    """Merges give what the model says, and the changes since any version turn that version into now."""
    states = [({}, 0)]
    for merged, delete in merges:
        before, version = states[-1]
        after = expected(before, merged, delete)
        written = lake.merge(table, things(merged), run="r", delete_unmatched=delete)
        assert written.inserted == len(after.keys() - before.keys())
        assert written.deleted == len(before.keys() - after.keys())
        assert written.updated == sum(after[key] != before[key] for key in after.keys() & before.keys())
        assert hashes(lake.read(table)) == after
        assert (written.version > version) == (written.changed or (len(states) == 1 and written.version > 0))
        states.append((after, written.version))
    now = states[-1][0]
    for state, version in states:
        changes = lake.changes(table, version)
        assert len(set(changes["key"].to_pylist())) == changes.num_rows
        for row in changes.to_pylist():
            if row["change"] == "delete":
                state.pop(row["key"], None)
            else:
                state[row["key"]] = row["content_hash"]
        assert state == now
    assert hashes(lake.changes(table, None)) == now


@pytest.mark.slow
@given(merges=MERGES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changes_since_any_version_turn_it_into_now(tmp_path_factory: pytest.TempPathFactory, merges: list) -> None:
    check_law(Lake(str(tmp_path_factory.mktemp("lake")), "dev", "qa"), OTHER_THINGS, merges)


@pytest.mark.spark
@given(merges=MERGES)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_changes_since_any_version_turn_it_into_now_when_spark_commits(
    tmp_path_factory: pytest.TempPathFactory, spark_url: str, merges: list
) -> None:
    root = str(tmp_path_factory.mktemp("lake"))
    lake = Lake(root, "dev", "qa", spark_url=spark_url, spark_tables=frozenset({OTHER_THINGS.path}))
    check_law(lake, OTHER_THINGS, merges)
