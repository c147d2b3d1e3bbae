"""What the audit trail promises to whoever appends: one chain, each event once, nothing of it taken back."""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.pool import Pool
from pathlib import Path
from time import time

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from millrace.environments.audit import verify
from millrace.errors import AuditError
from millrace.lakehouse.audit.chain import record
from millrace.lakehouse.audit.head import noted, noted_in
from millrace.lakehouse.audit.key_uses import KeyUses
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_AUDIT, PLATFORM
from millrace.lakehouse.upkeep import keep_up
from millrace.settings import Settings
from millrace.sources.pseudonym import pseudonym
from tests.lakehouse.things import happened, record_often

NOON = datetime(2026, 11, 25, 12, 30, tzinfo=UTC)


@pytest.fixture
def trail(settings: Settings) -> Lake:
    return Lake.of(settings, PLATFORM)


def entries(trail: Lake) -> list[dict]:
    return trail.read(OPS_AUDIT).sort_by("sequence").to_pylist()


@pytest.mark.slow
def test_four_processes_that_append_at_once_make_one_chain_with_each_event_once(
    settings: Settings, trail: Lake, processes: Pool
) -> None:
    start = time() + 0.15
    made = processes.starmap(record_often, [(settings, writer, 2, start) for writer in range(4)])
    assert sum(made) == 4 * 2 + 2
    whole = verify(settings)
    assert whole.entries == 10
    told = [entry["event_id"] for entry in entries(trail)]
    assert sorted(told) == sorted([f"{w}-{i}" for w in (*range(4), "shared") for i in range(2)])
    assert noted(settings) == whole.head


def test_an_event_that_is_told_again_is_the_same_entry(settings: Settings, trail: Lake) -> None:
    assert record(settings, [happened("a"), happened("b"), happened("a")], run="r") == 2
    version = trail.version(OPS_AUDIT)
    assert record(settings, [happened("b")], run="again") == 0
    assert trail.version(OPS_AUDIT) == version
    assert record(settings, [happened("b"), happened("c")], run="r") == 1
    assert [(entry["sequence"], entry["event_id"]) for entry in entries(trail)] == [(0, "a"), (1, "b"), (2, "c")]


def test_the_hash_can_be_computed_from_what_the_module_says_alone(settings: Settings, trail: Lake) -> None:
    """As somebody else's program would: with nothing of Millrace."""
    record(settings, [happened("a", details={"b": "grün\n", "a": 0.5}), happened("c")], run="r")
    previous = "0" * 64
    for entry in entries(trail):
        parts = [
            f'"action":"decision","actor":"service/controller","application":"qa","details":'
            f'{json.dumps(entry["details"], ensure_ascii=False)},"event_id":"{entry["event_id"]}"',
            f'"month":"{entry["month"]}","occurred_at":1795608000000000,"outcome":"hold","previous_hash":"{previous}"',
            f'"release_id":null,"release_version":null,"resource":"rollout","run":"test","sequence":{entry["sequence"]}',
        ]
        previous = hashlib.sha256(f"{{{','.join(parts)}}}".encode()).hexdigest()
        assert entry["hash"] == previous
    assert entries(trail)[0]["details"] == '{"a":0.5,"b":"grün\\n"}'


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.delete("sequence = 0"),
        lambda table: table.update({"outcome": "'promote'"}),
        lambda table: write_deltalake(table, table.to_pyarrow_table().slice(1), mode="overwrite"),
        lambda table: (
            table.merge(table.to_pyarrow_table(), "t.sequence = s.sequence", source_alias="s", target_alias="t")
            .when_matched_delete()
            .execute()
        ),
    ],
)
def test_delta_itself_refuses_to_change_or_remove_an_entry(
    change: Callable[[DeltaTable], object], settings: Settings, trail: Lake
) -> None:
    record(settings, [happened("a"), happened("b")], run="r")
    with pytest.raises(Exception, match="append-only"):
        change(DeltaTable(trail.uri(OPS_AUDIT)))
    assert verify(settings).entries == 2


def test_upkeep_makes_few_files_of_many_and_leaves_the_chain_whole_and_going_on(
    settings: Settings, trail: Lake
) -> None:
    for number in range(4):
        record(settings, [happened(f"{number}")], run="r")
    kept = keep_up(trail, OPS_AUDIT)
    assert (kept.files_before, kept.files) == (4, 1)
    assert verify(settings).entries == 4
    record(settings, [happened("later"), happened("0")], run="r")
    assert verify(settings).entries == 5


def test_a_user_is_in_the_trail_as_a_pseudonym_only(settings: Settings, trail: Lake) -> None:
    """What is planted is searched for in every byte of the table: its files are read, since they are compressed."""
    user = "erika.mustermann@example.org"
    hidden = pseudonym(b"key", user)
    told = {"actor": "person/ann", "action": "erasure", "outcome": "key destroyed"}
    record(settings, [happened("e", resource=f"user/{hidden}", **told)], run="r")
    record(settings, [happened("f", actor=f"user/{hidden}", action="key", resource="key/1", outcome="made")], run="r")
    for planted in (
        {"actor": f"user/{user}"},
        {"actor": user},
        {"resource": f"user/{user}"},
        {"resource": "user/erika"},
        {"details": {"who": user}},
        {"outcome": f"forgot {user}"},
    ):
        with pytest.raises(AuditError, match=r"pseudonym"):
            record(settings, [happened("g", **planted)], run="r")
    account = {"change": "let arn:aws:iam::123456789012:user/millrace-prod write dev"}
    record(settings, [happened("h", action="permission", details=account)], run="r")
    said = "".join(path.read_text() for path in Path(trail.uri(OPS_AUDIT)).rglob("*.json"))
    files = [path for path in Path(trail.uri(OPS_AUDIT)).rglob("*.parquet") if "_delta_log" not in path.parts]
    said += "".join(str(pq.read_table(path).to_pylist()) for path in files)
    assert len(files) == 3
    assert hidden in said
    assert "erika" not in said


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"action": "party"}, "its action 'party' is none of decision, approval"),
        ({"occurred_at": datetime(2026, 11, 25)}, "has no time zone"),
        ({"actor": "ann"}, "its actor is not service/…, person/…"),
    ],
)
def test_what_cant_be_understood_is_refused_before_it_is_for_ever(
    wrong: dict, why: str, settings: Settings, trail: Lake
) -> None:
    with pytest.raises(AuditError, match=why):
        record(settings, [happened("a", **wrong)], run="r")
    assert not trail.exists(OPS_AUDIT)


def test_a_head_that_the_trail_has_lost_stays_noted_and_appending_goes_on(
    settings: Settings, trail: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        record(settings, [happened(f"{number}")], run="r")
    lost = noted(settings)
    DeltaTable(trail.uri(OPS_AUDIT)).restore(2)
    for number in range(10, 14):
        record(settings, [happened(f"{number}")], run="r")
    assert noted(settings) == lost
    assert "lacks entry 2" in caplog.text


def test_a_noted_head_that_cant_be_understood_is_said_and_not_replaced(settings: Settings) -> None:
    record(settings, [happened("a")], run="r")
    noted_in(settings).write_text("{")
    with pytest.raises(AuditError, match=r"dev\.json can't be understood"):
        record(settings, [happened("b")], run="r")
    assert noted_in(settings).read_text() == "{"


def test_the_uses_of_a_key_in_an_hour_become_one_entry_and_each_is_counted_once(
    settings: Settings, trail: Lake
) -> None:
    uses = KeyUses()
    for minute in range(3):
        uses.count("k1", "qa", "answered", at=NOON + timedelta(minutes=minute))
    uses.count("k1", "qa", "refused", at=NOON)
    uses.count("k1", "qa", "answered", at=NOON + timedelta(hours=1))
    assert uses.flush(settings, run="r", now=NOON + timedelta(minutes=10)) == 0
    assert uses.flush(settings, run="r", now=NOON + timedelta(hours=1)) == 2
    uses.count("k1", "qa", "answered", at=NOON)
    assert uses.flush(settings, run="r") == 2
    assert uses.flush(settings, run="r") == 0
    told = [(e["actor"], e["outcome"], e["occurred_at"].hour, json.loads(e["details"])["uses"]) for e in entries(trail)]
    assert sorted(told) == [
        ("key/k1", "answered", 12, 1),
        ("key/k1", "answered", 12, 3),
        ("key/k1", "answered", 13, 1),
        ("key/k1", "refused", 12, 1),
    ]
