"""The trail is walked: whole, or broken at the entry at which somebody changed, removed, moved or cut something."""

import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from typer.testing import CliRunner

from millrace.cli import app
from millrace.environments.audit import search, verify
from millrace.errors import AuditError
from millrace.lakehouse.audit import journals
from millrace.lakehouse.audit.chain import digest, record
from millrace.lakehouse.audit.head import noted, noted_in
from millrace.lakehouse.audit.journals import follow
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.rows import properties
from millrace.lakehouse.tables import OPS_AUDIT, OPS_DECISIONS, PLATFORM
from millrace.rollout.decisions import State, append, decide
from millrace.settings import Settings
from tests.lakehouse.things import happened

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
OTHERS = {
    "month": "2026-10",
    "event_id": "another",
    "occurred_at": NOON + timedelta(microseconds=1),
    "actor": "person/eve",
    "action": "approval",
    "application": "another",
    "resource": "another",
    "release_id": "another",
    "release_version": "another",
    "outcome": "another",
    "details": '{"n":7}',
    "run": "another",
    "previous_hash": "1" * 64,
    "hash": "1" * 64,
}


@pytest.fixture
def lake(settings: Settings) -> Lake:
    """Five entries, two of them in one batch."""
    for events in ("a", "bc", "d", "e"):
        told = [happened(event, occurred_at=NOON, details={"n": number}) for number, event in enumerate(events)]
        record(settings, told, run="r")
    return Lake.of(settings, PLATFORM)


def rewritten(lake: Lake, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """The table written anew by somebody who may write its files, with the properties that it had."""
    uri = lake.uri(OPS_AUDIT)
    rows = change(lake.read(OPS_AUDIT).sort_by("sequence").to_pylist())
    shutil.rmtree(uri)
    table = pa.Table.from_pylist(rows, schema=OPS_AUDIT.schema)
    kept = {name: value for name, value in properties(OPS_AUDIT).items() if name.startswith("delta.")}
    write_deltalake(uri, table, partition_by=["month"], configuration=kept)


def rehashed(rows: list[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """A chain that is whole again from `start` on."""
    for number in range(start, len(rows)):
        rows[number]["previous_hash"] = rows[number - 1]["hash"] if number else "0" * 64
        rows[number]["hash"] = digest(rows[number])
    return rows


def test_a_whole_trail_says_its_length_and_its_end(settings: Settings, lake: Lake) -> None:
    trail = verify(settings)
    assert (trail.entries, trail.head, trail.waiting) == (5, noted(settings), 0)
    assert trail.head is not None
    assert trail.head.sequence == 4
    assert verify(settings, head=trail.head.hash) == trail


def test_a_trail_that_nobody_has_begun_is_whole(settings: Settings) -> None:
    assert verify(settings).entries == 0


@pytest.mark.parametrize("column", sorted(set(OPS_AUDIT.rows_schema.names) - {"sequence"}))
def test_a_changed_column_breaks_the_trail_at_that_entry(column: str, settings: Settings, lake: Lake) -> None:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[2][column] = OTHERS[column]
        return rows

    rewritten(lake, change)
    # In another month it isn't found where it was.
    with pytest.raises(AuditError, match=f"broken at entry {0 if column == 'month' else 2}"):
        verify(settings)


def swapped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows[1]["sequence"], rows[3]["sequence"] = 3, 1
    return rows


def swapped_and_rehashed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Who reorders and hashes each entry anew, but not those after."""
    rows = sorted(swapped(rows), key=lambda row: row["sequence"])
    for number in (1, 3):
        rows[number]["previous_hash"] = rows[number - 1]["hash"]
        rows[number]["hash"] = digest(rows[number])
    return rows


def the_last_changed_and_rehashed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows[4]["outcome"] = "promote"
    return rehashed(rows, 4)


def changed_and_rehashed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows[2]["outcome"] = "promote"
    return rehashed(rows, 2)


def removed_and_renumbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = rows[:2] + rows[3:]
    for number, row in enumerate(rows):
        row["sequence"] = number
    return rehashed(rows, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[:2] + rows[3:], "at entry 2: it is missing, the next is 3"),
        (lambda rows: rows[1:], "at entry 0: it is missing, the next is 1"),
        (lambda rows: [*rows, rows[3]], "at entry 4: entry 3 is there once more"),
        (swapped, "at entry 1: it was changed"),
        (swapped_and_rehashed, "at entry 2: it names .* as the hash of the entry before, which is another"),
        (lambda rows: rows[:3], r"at entry 3: it is missing, and so are all up to 4, which .*dev\.json noted"),
        (lambda rows: [], "at entry 0: it is missing, and so are all up to 4"),
        (changed_and_rehashed, "at entry 4 or before: .* somebody wrote the trail anew"),
        (the_last_changed_and_rehashed, "at entry 4 or before"),
        (removed_and_renumbered, "at entry 4: it is missing"),
    ],
)
def test_what_was_done_to_the_rows_is_found_and_the_first_broken_entry_named(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], told: str, settings: Settings, lake: Lake
) -> None:
    rewritten(lake, change)
    with pytest.raises(AuditError, match=told):
        verify(settings)
    assert noted(settings) is not None


def test_a_byte_changed_in_one_of_the_files_is_found(settings: Settings, lake: Lake) -> None:
    for path in Path(lake.uri(OPS_AUDIT)).glob("month=*/*.parquet"):
        rows = pq.ParquetFile(path).read()
        if rows["sequence"][0].as_py() == 3:
            at = rows.schema.get_field_index("outcome")
            field = rows.schema.field(at)
            pq.write_table(rows.set_column(at, field, pa.array(["skip"], field.type)), path)
    with pytest.raises(AuditError, match="broken at entry 3: it was changed"):
        verify(settings)


def test_a_cut_tail_is_found_by_the_hash_that_a_person_noted_even_if_the_home_was_changed_too(
    settings: Settings, lake: Lake
) -> None:
    trail = verify(settings)
    assert trail.head is not None
    DeltaTable(lake.uri(OPS_AUDIT)).restore(2)
    with pytest.raises(AuditError, match="at entry 3: it is missing"):
        verify(settings)
    noted_in(settings).unlink()
    assert verify(settings).entries == 3
    with pytest.raises(AuditError, match="none of the 3 entries"):
        verify(settings, head=trail.head.hash)
    record(settings, [happened(f"{number}") for number in range(4)], run="r")
    with pytest.raises(AuditError, match="none of the 7 entries"):
        verify(settings, head=trail.head.hash)


def test_a_clock_that_is_behind_puts_no_entry_before_its_predecessor(settings: Settings, lake: Lake) -> None:
    """The trail is walked by month: here the last entry was appended by a machine of the far future."""
    rewritten(lake, lambda rows: rehashed([*rows[:-1], rows[-1] | {"month": "2999-01"}], 4))
    noted_in(settings).unlink()
    record(settings, [happened("later")], run="r")
    assert verify(settings).entries == 6
    assert search(settings, text="later")[0]["month"] == "2999-01"


def test_a_table_that_would_let_entries_be_changed_is_not_trusted(settings: Settings, lake: Lake) -> None:
    DeltaTable(lake.uri(OPS_AUDIT)).alter.set_table_properties({"delta.appendOnly": "false"})
    with pytest.raises(AuditError, match=r"took delta\.appendOnly from the table"):
        verify(settings)


def test_a_journal_that_was_changed_or_shortened_contradicts_the_trail(settings: Settings) -> None:
    journal = Lake.of(settings, "qa")
    first = decide(State(), "bootstrap", actor="controller", reason="the first", champion="1")
    append(journal, first, run="test")
    assert verify(settings).waiting == 1, "of an application that no entry names"
    assert follow(settings, "qa", run="test") == 1
    append(journal, decide(State().after(first), "freeze", actor="ann", reason="because"), run="person/ann")
    assert verify(settings).waiting == 1
    assert follow(settings, "qa", run="test") == 1
    assert verify(settings).waiting == 0
    table = DeltaTable(journal.uri(OPS_DECISIONS))
    table.update({"champion": "'2'"}, predicate="sequence = 0")
    with pytest.raises(AuditError, match=r"entry 0: ops/decisions/0 of qa has another release_version, champion"):
        verify(settings)
    table.update({"champion": "'1'"}, predicate="sequence = 0")
    table.delete("sequence = 1")
    with pytest.raises(AuditError, match="entry 1: ops/decisions/1 of qa, which it tells of, is gone"):
        verify(settings)


def test_what_was_followed_is_not_read_again_unless_the_trail_may_lack_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "MARGIN", timedelta(0))
    journal = Lake.of(settings, "qa")
    first = decide(State(), "bootstrap", actor="controller", reason="the first", champion="1")
    append(journal, first, run="test")
    assert follow(settings, "qa", run="test") == 1
    (kept,) = Path(journal.uri(OPS_DECISIONS)).glob("*.parquet")
    aside = kept.rename(kept.with_suffix(".aside"))
    assert follow(settings, "qa", run="test") == 0
    append(journal, decide(State().after(first), "freeze", actor="ann", reason="because"), run="person/ann")
    assert follow(settings, "qa", run="test") == 1, "without the file that has the first decision"
    aside.rename(kept)

    # A trail from an older backup than the journal.
    shutil.rmtree(Lake.of(settings, PLATFORM).uri(OPS_AUDIT))
    noted_in(settings).unlink()
    assert follow(settings, "qa", run="test") == 0
    assert follow(settings, "qa", run="upkeep", whole=True) == 2
    assert [entry["outcome"] for entry in search(settings)] == ["bootstrap", "freeze"]


@pytest.fixture
def varied(settings: Settings) -> None:
    told = [
        happened("1", occurred_at=NOON, actor="person/ann", action="approval", outcome="admit"),
        happened("2", occurred_at=NOON + timedelta(hours=1), actor="person/hannah", resource="index/2"),
        happened("3", occurred_at=NOON + timedelta(hours=2), application="handbook", details={"index": "Build-7"}),
        happened("4", occurred_at=NOON + timedelta(hours=3), action="gate", outcome="refused", release_version="7"),
    ]
    record(settings, told, run="r")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, "1234"),
        ({"since": datetime(2026, 11, 25, 13)}, "234"),
        ({"since": NOON + timedelta(hours=1), "until": NOON + timedelta(hours=3)}, "23"),
        ({"actor": "ann"}, "1"),
        ({"actor": "person/hannah"}, "2"),
        ({"action": "gate"}, "4"),
        ({"application": "qa"}, "124"),
        ({"resource": "INDEX/2"}, "2"),
        ({"text": "build-7"}, "3"),
        ({"text": "an", "action": "approval"}, "1"),
        ({"application": "qa", "limit": 2}, "24"),
        ({"text": "nothing of the kind"}, ""),
    ],
)
def test_a_search_finds_by_whatever_is_given(
    wanted: dict[str, Any], found: str, settings: Settings, varied: None
) -> None:
    assert "".join(entry["event_id"] for entry in search(settings, **wanted)) == found


def test_a_search_for_an_action_that_there_is_not_says_so(settings: Settings) -> None:
    with pytest.raises(AuditError, match="there is no action 'gates'; there are decision, approval, gate"):
        search(settings, action="gates")


def test_the_commands_say_what_was_found_and_whether_it_is_whole(
    settings: Settings, varied: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_HOME", str(settings.home))
    run = CliRunner()
    shown = run.invoke(app, ["audit", "search", "--since", "2026-11-25T13:00:00", "-a", "qa"])
    assert re.findall(r"^ *(\d+) +2026-11-25", shown.output, re.MULTILINE) == ["1", "3"]
    told = json.loads(run.invoke(app, ["audit", "search", "build", "--json"]).output)
    assert [(entry["sequence"], entry["details"]) for entry in told] == [(2, {"index": "Build-7"})]
    assert run.invoke(app, ["audit", "search", "--actor", "bob"]).output == "No entry.\n"

    whole = run.invoke(app, ["audit", "verify"])
    head = noted(settings)
    assert head is not None
    assert whole.output == f"4 entries of dev, chain whole, head {head.hash} at 2026-11-25 15:00:00 UTC\n"
    assert run.invoke(app, ["audit", "verify", "--head", head.hash]).exit_code == 0
    rewritten(Lake.of(settings, PLATFORM), lambda rows: rows[:3])
    cut = run.invoke(app, ["audit", "verify"])
    assert cut.exit_code == 1
    assert cut.stderr.startswith("the audit trail is broken at entry 3: it is missing")
