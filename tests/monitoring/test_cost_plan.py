"""A plan of costs: measured on real rows, written out by hand, refused in one sentence where something is missing."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from millrace.cli import app
from millrace.errors import CostError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS, SILVER_CHUNKS
from millrace.monitoring.break_even import DAYS, OWN_MODEL
from millrace.monitoring.cost_check import check
from millrace.monitoring.cost_history import History, Period, busy, inputs_of, read_history
from millrace.monitoring.cost_plan import (
    BOOKED,
    CostPlan,
    Inputs,
    Shortening,
    Speed,
    Spending,
    Usage,
    capped_answers,
    one_chunk_less,
    plan,
    shorter_prompt,
)
from millrace.policies import Plan, Prices, TokenPrice
from millrace.settings import Settings
from tests.monitoring.silver import NOON, exchange, write

DAY = timedelta(days=1)
PRICES = Prices(
    prompt_million_tokens=1.0, completion_million_tokens=4.0, training_hour=2.0, embedding_hour=1.0, evaluation_hour=0.5
)
SMALL = TokenPrice(prompt_million_tokens=0.5, completion_million_tokens=2.0)
LARGE = TokenPrice(prompt_million_tokens=5.0, completion_million_tokens=20.0)
POLICY = Plan(machine_hour=1.0, apis={"small": SMALL, "large": LARGE}, utilisation=0.5, peak_factor=2.0)
MONTHLY = (
    Spending("training", 4, 7200, 100_000, 4.0),
    Spending("evaluation", 4, 3600, 1_000_000, 2.1),
    Spending("embedding", 30, 3600, 500_000, 1.0),
    Spending("batch", 2, 0, 2_000_000, 3.2),
)


def inputs(load: float = 10_000, usage: Usage | None = None, **changes: Any) -> Inputs:
    values: dict[str, Any] = {"policy": POLICY, "prices": PRICES, "spending": MONTHLY, "booked": None} | changes
    speed = values.pop("speed", Speed(0.001, 0.01, told_apart=True))
    return Inputs(load, usage or Usage(400, 20), speed, **values)


def by_name(planned: CostPlan) -> dict[str, Any]:
    return {line.name: line for line in planned.lines}


def test_a_plan_is_what_its_arithmetic_says() -> None:
    planned = plan(inputs(booked=TokenPrice(prompt_million_tokens=1, completion_million_tokens=4)))
    lines = by_name(planned)
    assert list(lines) == [OWN_MODEL, "large", "small", BOOKED]
    # 0.6 s a query; half of a day at half of the peak: 36,000 queries a machine.
    assert planned.machine_queries_per_day == pytest.approx(86_400 * 0.5 / 2 / 0.6)
    assert planned.tokens_per_second == pytest.approx(420 / 0.6)
    own = lines[OWN_MODEL]
    assert (own.machines, own.serving_usd) == (1, pytest.approx(730.0))
    assert (own.development_usd, own.batch_usd) == (pytest.approx(7.1), pytest.approx(3.2))
    assert own.production_usd == pytest.approx(733.2)
    assert own.month_usd == pytest.approx(740.3)
    assert own.thousand_answers_usd == pytest.approx(740.3 / (10_000 * DAYS) * 1000)
    # 400 tokens at $0.5 and 20 at $2 a million: $0.00024 a query. It trains nothing; its own tokens are evaluated.
    small, token = lines["small"], 0.00024 / 420
    assert small.serving_usd == pytest.approx(0.00024 * 10_000 * DAYS)
    assert small.development_usd == pytest.approx(0.5 + 1_000_000 * token + 1.0)
    assert small.batch_usd == pytest.approx(2_000_000 * token)
    assert small.machines is None
    assert lines[BOOKED].serving_usd == pytest.approx(0.00048 * 10_000 * DAYS)
    assert planned.cheapest == "small"
    assert [against.api for against in planned.break_even] == ["large", "small"]


def test_answers_from_the_cache_are_neither_computed_nor_paid() -> None:
    cold, warm = plan(inputs()), plan(inputs(usage=Usage(400, 20, cached_share=0.5)))
    assert by_name(warm)["small"].serving_usd == pytest.approx(by_name(cold)["small"].serving_usd / 2)
    assert warm.machine_queries_per_day == pytest.approx(2 * cold.machine_queries_per_day)
    assert warm.tokens_per_second == pytest.approx(cold.tokens_per_second)


def test_shortenings_save_by_tokens_and_on_machines_only_whole_ones() -> None:
    usage = Usage(400, 20)
    chunk = one_chunk_less(usage, 100)
    assert chunk is not None
    planned = plan(
        inputs(40_000, usage), [chunk, shorter_prompt(usage, 0.2), capped_answers(usage, 10, {5: 1, 10: 1, 45: 1})]
    )
    assert by_name(planned)[OWN_MODEL].machines == 2
    less, shorter, capped = planned.savings
    assert (less.prompt_tokens, shorter.prompt_tokens) == (100, pytest.approx(80))
    # 0.5 s instead of 0.6: one machine carries 43,200.
    assert less.saved_usd[OWN_MODEL] == pytest.approx(730)
    assert less.machine_time == pytest.approx(1 / 6)
    assert less.saved_usd["small"] == pytest.approx(100 * 0.5e-6 * 40_000 * DAYS)
    assert shorter.saved_usd[OWN_MODEL] == pytest.approx(730)
    # Of 60 tokens 25 remain; the others are in one long answer.
    assert capped.completion_tokens == pytest.approx(20 * 35 / 60)
    assert one_chunk_less(usage, 400) is None
    # Recorded answers are shorter than the plan's: a cap holds for the plan's.
    assert capped_answers(usage, 10, {5: 1, 10: 1}).usage.completion_tokens == 10
    assert capped_answers(usage, 10, {0: 5}).usage.completion_tokens == 10
    assert capped_answers(usage, 10, {}).usage.completion_tokens == 10
    assert capped_answers(usage, 30, {}).usage.completion_tokens == 20


TOKENS = st.floats(1, 5000)


@pytest.mark.slow
@given(
    prompt=TOKENS,
    completion=TOKENS,
    cached=st.floats(0, 0.99),
    load=st.floats(1, 1e6),
    share=st.floats(0.01, 0.99),
    chunk=TOKENS,
    most=st.integers(1, 5000),
    lengths=st.dictionaries(st.integers(1, 5000), st.integers(1, 100)),
    rates=st.tuples(st.floats(1e-5, 1), st.floats(1e-5, 1)),
)
def test_shortening_never_costs_more(
    prompt: float,
    completion: float,
    cached: float,
    load: float,
    share: float,
    chunk: float,
    most: int,
    lengths: dict[int, int],
    rates: tuple[float, float],
) -> None:
    usage = Usage(prompt, completion, cached)
    shortenings: list[Shortening | None] = [
        shorter_prompt(usage, share),
        one_chunk_less(usage, chunk),
        capped_answers(usage, most, lengths),
    ]
    taken = [shortening for shortening in shortenings if shortening]
    speed = Speed(*rates, told_apart=True)
    planned = plan(inputs(load, usage, speed=speed, booked=SMALL), taken)
    assert len(planned.savings) == len(taken)
    for saving in planned.savings:
        assert -1e-9 <= saving.machine_time < 1
        assert all(saved >= -1e-6 * by_name(planned)[name].month_usd for name, saved in saving.saved_usd.items())


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda: inputs(0), "queries per day: 0 can't be planned with; give a number above 0"),
        (lambda: inputs(-1), "queries per day: -1 can't"),
        (lambda: inputs(float("nan")), "queries per day: nan can't"),
        (lambda: inputs(float("inf")), "queries per day: inf can't"),
        (lambda: Usage(float("nan"), 1), "prompt tokens per answer: nan can't"),
        (lambda: Usage(1, 0), "completion tokens per answer: 0 can't"),
        (lambda: Usage(1, 1, 1.0), "share of answers from the cache is 1.0"),
        (lambda: Speed.even(0), "tokens per second: 0 can't"),
        (lambda: shorter_prompt(Usage(1, 1), 1.0), "1.0 is no share of the prompt's tokens"),
        (lambda: capped_answers(Usage(1, 1), 0, {}), "most tokens of an answer: 0 can't"),
        (lambda: plan(inputs(policy=Plan())), r"no machine price: add `machine_hour` to \[plan\]"),
    ],
)
def test_what_can_not_be_planned_with_is_one_sentence(broken: Callable[[], Any], said: str) -> None:
    with pytest.raises(CostError, match=said):
        broken()


def test_busy_time_is_counted_once_where_answers_overlap() -> None:
    starts = np.array([5.0, 0.0, 1.0, 20.0])
    ends = np.array([6.0, 4.0, 2.0, 21.0])
    assert busy(starts, ends) == 4 + 1 + 1
    assert busy(np.array([]), np.array([])) == 0


# A lake with four days of real rows.

CHARACTERS = {"short": 200, "middle": 400, "long": 800}


def answered(seed: int, start: datetime, count: int, **changes: Any) -> list[dict[str, Any]]:
    """Answers at even times over two days: 0.25 tokens a character of the prompt over 50 of its template, 1 ms a prompt
    token and 20 ms a completion token, booked at `PRICES`; every tenth comes from the cache."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        cited = [str(name) for name in rng.choice(list(CHARACTERS), size=2, replace=False)]
        question = "?" * int(rng.integers(20, 120))
        prompt = 50 + round(0.25 * (len(question) + sum(CHARACTERS[name] for name in cited)))
        completion = int(rng.integers(5, 40))
        cached = number % 10 == 9
        fields = {
            "question": question,
            "citations": cited,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "from_cache": cached,
            "seconds": 0.001 * prompt + 0.02 * completion,
            "cost_usd": 0.0 if cached else PRICES.answer("any", prompt, completion),
        }
        rows.append(exchange(start + 2 * DAY * number / count, **fields | changes))
    return rows


def cost(stage: str, subject: str, at: datetime, seconds: float, tokens: int, cost_usd: float) -> dict[str, Any]:
    return {
        "cost_id": content_hash(stage, subject, at.isoformat()),
        "content_hash": "-",
        "stage": stage,
        "subject": subject,
        "release_id": None,
        "seconds": seconds,
        "tokens": tokens,
        "cost_usd": cost_usd,
        "at": at,
    }


@pytest.fixture
def used(lake: Lake) -> Lake:
    write(lake, [*answered(1, NOON, 400), *answered(2, NOON + 2 * DAY, 500), exchange(NOON + DAY, state="failed")])
    chunks = [
        {"chunk_id": name, "text": "x" * characters, "position": 0, "section": None}
        | dict.fromkeys(("content_hash", "document_id", "source", "uri", "title"), "-")
        for name, characters in CHARACTERS.items()
    ]
    lake.merge(SILVER_CHUNKS, pa.Table.from_pylist(chunks, schema=SILVER_CHUNKS.rows_schema), run="test")
    spent = [
        cost("training", "first", NOON + DAY / 2, 3600, 1000, 2.0),
        cost("training", "second", NOON + 2.5 * DAY, 7200, 2000, 4.0),
        cost("optimisation", "study", NOON + DAY / 2, 60, 1000, 0.5),
        cost("optimisation", "study", NOON + DAY, 60, 1000, 0.25),
    ]
    lake.merge(OPS_COSTS, pa.Table.from_pylist(spent, schema=OPS_COSTS.rows_schema), run="test")
    return lake


def history(lake: Lake, since: datetime | None = None, until: datetime | None = None) -> History:
    return read_history(lake, PRICES, Period(since, until))


@pytest.mark.slow
def test_what_was_answered_is_measured(used: Lake) -> None:
    found = history(used, until=NOON + 2 * DAY)
    answers, usage = found.answers, found.answers.usage
    assert (answers.count, answers.cached, answers.simulated, answers.days) == (400, 40, 400, 2.0)
    assert usage is not None
    assert usage.cached_share == 0.1
    assert answers.prompt_tokens == pytest.approx(360 * usage.prompt_tokens)
    assert sum(answers.lengths.values()) == 360
    # One by one, so busy time is the sum of the answers' times; and those were made of tokens.
    assert answers.at_once == pytest.approx(1)
    assert answers.speed is not None
    assert answers.speed.told_apart
    assert answers.speed.prompt_token_seconds == pytest.approx(0.001)
    assert answers.speed.completion_token_seconds == pytest.approx(0.02)
    # The last citation, in the mean of three sizes: a quarter of (200 + 400 + 800) / 3 characters.
    assert answers.chunk_tokens == pytest.approx(0.25 * 1400 / 3, rel=0.1)
    assert answers.booked == TokenPrice(prompt_million_tokens=1, completion_million_tokens=4)
    assert {use.stage: (use.uses, use.cost_usd) for use in found.stages} == {
        "training": (1, 2.0),
        "optimisation": (1, 0.75),
    }


def test_answers_that_overlap_make_a_faster_machine_than_one_stream(lake: Lake) -> None:
    together = answered(1, NOON, 100, from_cache=False)
    for number, row in enumerate(together):
        row["occurred_at"] = NOON + timedelta(seconds=10 * (number // 4))
        row["date"] = row["occurred_at"].date()
    write(lake, together)
    answers = history(lake).answers
    assert 2 < answers.at_once < 4
    assert answers.speed is not None
    assert answers.usage is not None
    tokens = answers.prompt_tokens + answers.completion_tokens
    assert answers.speed.tokens_per_second(answers.usage) == pytest.approx(tokens / answers.busy_seconds)
    assert answers.busy_seconds < answers.seconds / 2


def test_equal_answers_do_not_tell_prompt_from_completion_time(lake: Lake) -> None:
    write(lake, [exchange(NOON + timedelta(minutes=minute)) for minute in range(50)])
    answers = history(lake).answers
    assert answers.speed == Speed(pytest.approx(1 / 105), pytest.approx(1 / 105), told_apart=False)
    assert answers.chunk_tokens is None


def test_releases_are_booked_each_at_its_own_price(lake: Lake) -> None:
    prices = Prices(models={"small": SMALL, "large": LARGE})
    write(
        lake,
        [
            exchange(NOON, prompt_tokens=300, completion_tokens=30, cost_usd=SMALL.answer(300, 30)),
            exchange(NOON, prompt_tokens=100, completion_tokens=10, cost_usd=LARGE.answer(100, 10), release_id="rel-2"),
        ],
    )
    booked = read_history(lake, prices, Period()).answers.booked
    assert booked is not None
    assert booked.answer(400, 40) == pytest.approx(SMALL.answer(300, 30) + LARGE.answer(100, 10))


@pytest.mark.slow
def test_a_short_history_is_a_month_and_a_declared_frequency_is_another(used: Lake) -> None:
    found = history(used)
    assert found.days < DAYS
    spent = {one.stage: one.cost_usd for one in inputs_of(found, Plan(), PRICES).spending}
    assert spent == {"training": 6.0, "optimisation": 0.75}
    often = Plan(machine_hour=1, monthly={"training": 10, "evaluation": 3})
    made = inputs_of(found, often, PRICES)
    assert {one.stage: one.cost_usd for one in made.spending} == {"training": 30.0, "optimisation": 0.75}
    assert plan(made).unknown == ("evaluation",)


def test_a_long_history_is_scaled_to_a_month(lake: Lake) -> None:
    write(lake, answered(1, NOON - 70 * DAY, 50))
    rows = [cost("training", str(week), NOON - 70 * DAY + 7 * week * DAY, 60, 10, 1.0) for week in range(11)]
    lake.merge(OPS_COSTS, pa.Table.from_pylist(rows, schema=OPS_COSTS.rows_schema), run="test")
    (training,) = inputs_of(history(lake), Plan(), PRICES).spending
    assert (training.uses, training.cost_usd) == (pytest.approx(11 / 70 * DAYS), pytest.approx(11 / 70 * DAYS))


def checked(lake: Lake, **given: float) -> dict[str, Any]:
    earlier, later = (history(lake, part.since, part.until) for part in Period().split(NOON + 2 * DAY))
    held = check(inputs_of(earlier, POLICY, PRICES, shortest_days=0, **given), earlier, later)
    assert held.planned_from == {"1": 400}
    return {row.what: row for row in held.rows}


@pytest.mark.slow
def test_a_plan_from_two_days_holds_for_the_next_two(used: Lake) -> None:
    rows = checked(used)
    for what in ("prompt tokens per computed answer", "completion tokens per computed answer"):
        assert abs(rows[what].error) < 0.06, rows[what]
    # 500 answers came where 400 were expected: the load's error is in what rests on it, and in nothing else.
    assert rows["answers"].recorded == 500
    assert rows["answers"].error == pytest.approx(-0.2, abs=0.01)
    assert rows["answers as booked, per 1,000"].error == pytest.approx(0, abs=0.06)
    for what in ("prompt tokens", "completion tokens", "busy time", "answers as booked", "serving, small"):
        assert -0.26 < rows[what].error < -0.14, rows[what]
    real = history(used, NOON + 2 * DAY).answers
    assert rows["prompt tokens"].recorded == real.prompt_tokens
    assert rows["answers as booked"].recorded == pytest.approx(real.cost_usd)
    assert rows["serving, own model"].error == 0, "one machine is enough for either"
    assert rows["training"].recorded == 4.0
    assert rows["training"].predicted == pytest.approx(2.0, rel=0.01)
    assert rows["optimisation"].error is None, "nothing of it was recorded"


@pytest.mark.slow
def test_the_load_that_a_person_says_is_what_is_checked(used: Lake) -> None:
    rows = checked(used, queries_per_day=250)
    assert rows["answers"].error == pytest.approx(0, abs=0.01)
    assert abs(rows["answers as booked"].error) < 0.06


@pytest.mark.slow
def test_a_plan_that_does_not_hold_says_by_how_much(lake: Lake) -> None:
    later = answered(1, NOON + 2 * DAY, 400)
    for row in later:
        row["prompt_tokens"] *= 2
        row["cost_usd"] *= 3
    write(lake, [*answered(1, NOON, 400), *later])
    rows = checked(lake)
    assert rows["prompt tokens per computed answer"].error == pytest.approx(-0.5)
    assert rows["completion tokens per computed answer"].error == pytest.approx(0)
    assert rows["answers as booked, per 1,000"].error == pytest.approx(-2 / 3)


# As a person types it.

DECLARATION = """
name = "qa"
description = "a test"
sources = [{ kind = "python_topics", topics = ["if"] }]
prompt = { template = "{{ question }}" }
rollout = { steps = [{ share = 0.5, margin = 0.3 }] }
prices = { prompt_million_tokens = 1.0, completion_million_tokens = 4.0 }
"""
PLAN = """
[plan]
machine_hour = 1.0
[plan.apis.small]
prompt_million_tokens = 0.5
completion_million_tokens = 2.0
[plan.apis.large]
prompt_million_tokens = 5.0
completion_million_tokens = 20.0
"""


@pytest.fixture
def typed(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Types `millrace cost plan <words>`."""
    declared = tmp_path / "applications"
    declared.mkdir()
    (declared / "qa.toml").write_text(DECLARATION + PLAN)
    monkeypatch.setenv("MILLRACE_HOME", str(settings.home))
    monkeypatch.setenv("MILLRACE_APPLICATIONS", str(declared))

    def type_(*words: str, declaration: str = DECLARATION + PLAN) -> Result:
        (declared / "qa.toml").write_text(declaration)
        return CliRunner().invoke(app, ["cost", "plan", *words])

    return type_


@pytest.mark.slow
def test_a_person_reads_a_plan_and_a_program_reads_the_same(
    used: Lake, typed: Callable[..., Result], tmp_path: Path
) -> None:
    told = typed("--queries-per-day", "200000", "--plot", str(tmp_path / "plan.svg"))
    assert told.exit_code == 0, told.output
    assert "200,000 queries a day" in told.output
    assert "Break-even with large, queries a day: at first large; above 13," in told.output
    assert "Break-even with small: none, small is cheaper at every load" in told.output
    assert "one chunk less" in told.output
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert [path.name for path in tmp_path.glob("*plan*")] == ["plan.svg"], "nothing else is left"
    read = json.loads(typed("--queries-per-day", "200000", "--json").output)
    assert [line["name"] for line in read["lines"]] == [OWN_MODEL, "large", "small", BOOKED]
    assert read["savings"][0]["name"] == "one chunk less"
    assert read["measured"]["answers"]["count"] == 900
    measured = json.loads(typed("--json").output)
    assert measured["queries_per_day"] == pytest.approx(900 / 4, rel=0.01)


@pytest.mark.slow
def test_a_person_reads_a_check(used: Lake, typed: Callable[..., Result]) -> None:
    told = typed("--check", (NOON + 2 * DAY).strftime("%Y-%m-%dT%H:%M:%S"))
    assert told.exit_code == 0, told.output
    assert told.output.splitlines()[:2] == [
        "Planned from 400 answers (400 of release 1)",
        "Recorded in the 1.996 days after: 500 answers (500 of release 1)",
    ]
    (answers,) = [line.split() for line in told.output.splitlines() if line.startswith("answers  ")]
    assert answers == ["answers", "answers", "399.2", "500.0", "-20.2%"]
    alone = typed("--check", "2026-11-26T12:00:00", "--json", declaration=DECLARATION)
    assert {"answers", "prompt tokens", "answers as booked", "training"} <= {
        row["what"] for row in json.loads(alone.output)["rows"]
    }


@pytest.mark.slow
def test_before_anything_was_answered_a_plan_rests_on_what_a_person_says(
    typed: Callable[..., Result], tmp_path: Path
) -> None:
    said = ["--queries-per-day", "1000", "--prompt-tokens", "400", "--completion-tokens", "20"]
    told = typed(*said, "--tokens-per-second", "300", "--plot", str(tmp_path / "plan.png"))
    assert told.exit_code == 0, told.output
    assert "taken to need the same machine time" in told.output
    assert "One chunk less: not told" in told.output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


SAID = ("--queries-per-day", "1000", "--prompt-tokens", "400", "--completion-tokens", "20")


@pytest.mark.parametrize(
    ("words", "declaration", "said"),
    [
        ((), DECLARATION + PLAN, "no answer was computed, so its tokens are not known"),
        (SAID[2:], DECLARATION + PLAN, "0 answers over 0.00 hours don't tell the load of a day"),
        (SAID, DECLARATION + PLAN, "no throughput was measured"),
        ((*SAID, "--tokens-per-second", "300"), DECLARATION, "no machine price"),
        ((*SAID, "--tokens-per-second", "nan"), DECLARATION + PLAN, "tokens per second: nan can't be planned with"),
        (("--queries-per-day", "-3", *SAID[2:], "--tokens-per-second", "300"), DECLARATION + PLAN, "per day: -3 can't"),
        ((), f"{DECLARATION}[plan]\nmachine_hour = nan", "plan.machine_hour"),
        ((), f"{DECLARATION}[plan.apis.small]\nprompt_million_tokens = 1", "completion_million_tokens: Field required"),
        ((*SAID, "--plot", "plan.pdf"), DECLARATION + PLAN, "end its name with .svg or .png"),
        ((*SAID, "--plot", "nowhere/plan.svg"), DECLARATION + PLAN, "nowhere is not a folder"),
        ((*SAID, "--since", "2026-11-25", "--until", "2026-11-24"), DECLARATION + PLAN, "nothing lies between"),
        (("--check", "2026-11-25", "--shorter-prompt", "0.5"), DECLARATION + PLAN, "a check plans no shortening"),
        (("--check", "2026-11-25", "--plot", "plan.svg"), DECLARATION + PLAN, "a check plans no shortening"),
        (("--check", "2026-11-25"), DECLARATION + PLAN, "no answer was computed"),
        (
            (*SAID, "--tokens-per-second", "300", "--check", "2026-11-25"),
            DECLARATION + PLAN,
            "there is nothing to check against",
        ),
    ],
)
def test_what_is_missing_is_one_sentence_and_exit_status_1(
    typed: Callable[..., Result], words: tuple[str, ...], declaration: str, said: str
) -> None:
    result = typed(*words, declaration=declaration)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert said in result.stderr


def test_an_hour_of_answers_does_not_tell_a_day(lake: Lake, typed: Callable[..., Result]) -> None:
    write(lake, [exchange(NOON + timedelta(minutes=minute)) for minute in range(40)])
    assert "40 answers over 0.65 hours don't tell the load of a day" in typed().stderr
    assert typed("--queries-per-day", "500").exit_code == 0


def test_options_before_the_command_are_not_lost_in_silence(typed: Callable[..., Result]) -> None:
    result = CliRunner().invoke(app, ["cost", "--json", "plan"])
    assert result.exit_code == 2
    assert "options go behind the command" in result.stderr
