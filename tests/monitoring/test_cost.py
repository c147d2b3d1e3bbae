"""Costs: everything that was spent is counted once, by stage and by release, and has a price or a sentence."""

import json
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from millrace.applications import Application
from millrace.cli import app
from millrace.errors import SettingsError
from millrace.lakehouse.costs import Cost, attribute_cost, cost_id, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS
from millrace.monitoring.cost import NOBODY, SERVING, costs
from millrace.policies import Prices
from millrace.settings import Settings
from tests.conftest import DECLARATIONS
from tests.monitoring.silver import HOUR, NOON, exchange, write


def spent(stage: Any, subject: str, cost_usd: float, release_id: str | None = None) -> Cost:
    return Cost(
        cost_id(stage, subject), stage, subject, seconds=60, tokens=10, cost_usd=cost_usd, release_id=release_id
    )


@pytest.fixture
def used(lake: Lake) -> Lake:
    write(
        lake,
        [
            exchange(NOON, cost_usd=0.5),
            exchange(NOON + HOUR, cost_usd=0.25, simulated=False),
            exchange(NOON, cost_usd=1.0, release_id="rel-2", release_version="2"),
        ],
    )
    record_cost(lake, spent("embedding", "lineage", 0.125), run="test")
    record_cost(lake, spent("training", "fingerprint", 4.0, "rel-2"), run="test")
    record_cost(lake, spent("evaluation", "eval", 2.0, "rel-2"), run="test")
    return lake


@pytest.mark.slow
def test_costs_add_up_by_stage_and_by_release(used: Lake, settings: Settings, qa: Application) -> None:
    found = costs(settings, qa)
    assert {line.name: line.cost_usd for line in found.by_stage} == {
        "training": 4.0,
        "evaluation": 2.0,
        SERVING: 1.75,
        "embedding": 0.125,
    }
    assert {(line.name, line.version): line.cost_usd for line in found.by_release} == {
        ("rel-2", "2"): 7.0,
        ("rel-1", "1"): 0.75,
        (NOBODY, ""): 0.125,
    }
    assert found.total_usd == sum(line.cost_usd for line in found.by_release) == 7.875
    serving = next(line for line in found.by_stage if line.name == SERVING)
    assert (serving.uses, serving.simulated, serving.tokens) == (3, 2, 315)


@pytest.mark.slow
def test_costs_since_a_moment_leave_out_what_was_before(used: Lake, settings: Settings, qa: Application) -> None:
    later = costs(settings, qa, since=NOON + HOUR)
    assert next(line for line in later.by_stage if line.name == SERVING).cost_usd == 0.25
    assert costs(settings, qa, since=(NOON + timedelta(days=9000)).replace(tzinfo=None)).total_usd == 0


def test_nothing_spent_costs_nothing(settings: Settings, qa: Application) -> None:
    assert asdict(costs(settings, qa)) == {
        "application": "qa",
        "since": None,
        "by_stage": [],
        "by_release": [],
        "total_usd": 0,
    }


@pytest.mark.slow
def test_a_person_reads_costs_and_a_program_reads_the_same(
    used: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_HOME", str(settings.home))
    monkeypatch.setenv("MILLRACE_APPLICATIONS", str(DECLARATIONS))
    told = CliRunner().invoke(app, ["cost"])
    assert told.exit_code == 0, told.output
    assert "$7.875000 in all; 2 of 3 answers to simulated users" in told.output
    read = json.loads(CliRunner().invoke(app, ["cost", "--json", "--since", "2026-11-24"]).output)
    assert read["total_usd"] == 7.875
    assert {line["name"] for line in read["by_release"]} == {"rel-1", "rel-2", NOBODY}
    assert CliRunner().invoke(app, ["cost", "-a", "nobody"]).exit_code == 1


def test_a_cost_is_recorded_once_and_attributed_once_its_release_is_known(lake: Lake) -> None:
    trained = spent("training", "fingerprint", 4.0)
    assert record_cost(lake, trained, run="first")
    assert attribute_cost(lake, trained.cost_id, "rel-2", run="released")
    version = lake.version(OPS_COSTS)
    assert not record_cost(lake, trained, run="again")
    assert not attribute_cost(lake, trained.cost_id, "rel-2", run="again")
    assert not attribute_cost(lake, "what nobody recorded", "rel-2", run="again")
    assert lake.version(OPS_COSTS) == version
    (row,) = lake.read(OPS_COSTS).to_pylist()
    assert (row["release_id"], row["cost_usd"], row["seconds"]) == ("rel-2", 4.0, 60)


def test_a_model_is_priced_by_the_longest_name_that_it_begins_with() -> None:
    prices = Prices.model_validate(
        {
            "models": {
                "Smol": {"prompt_million_tokens": 1, "completion_million_tokens": 2},
                "SmolLM2-360M": {"prompt_million_tokens": 10, "completion_million_tokens": 20},
            },
            "prompt_million_tokens": 100,
            "completion_million_tokens": 200,
        }
    )
    assert prices.answer("SmolLM2-135M-Instruct-4fa1.gguf", 1_000_000, 1_000_000) == 3
    assert prices.answer("SmolLM2-360M.gguf", 1_000_000, 0) == 10
    assert prices.answer("another", 0, 1_000_000) == 200
    assert Prices().answer("whatever", 1_000_000, 0) == 0.02


def test_a_model_without_a_price_is_one_sentence_and_not_free() -> None:
    prices = Prices.model_validate(
        {"models": {"gpt": {"prompt_million_tokens": 1, "completion_million_tokens": 2}}, "training_hour": 3}
    )
    with pytest.raises(SettingsError, match=r"generator 'llama' has no price: \[prices\.models\] names gpt; add one"):
        prices.answer("llama", 1, 1)
    again = Prices.model_validate(prices.model_dump(mode="json"))
    with pytest.raises(SettingsError, match="has no price"):
        again.answer("llama", 1, 1)


def test_a_machine_costs_by_the_hour_of_its_stage() -> None:
    prices = Prices(training_hour=2.0, evaluation_hour=0.5)
    assert prices.machine("training", 1800) == 1.0
    assert prices.machine("evaluation", 7200) == 1.0
    assert prices.machine("batch", 7200) == 0.0
