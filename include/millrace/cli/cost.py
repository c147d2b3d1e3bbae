"""`millrace cost`: what was spent; and `millrace cost plan`: what will be, and whether such a plan holds."""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from millrace.cli.terminal import ApplicationName, console, declaration, one_sentence
from millrace.errors import CostError
from millrace.lakehouse.lake import Lake
from millrace.monitoring.break_even import DAYS

if TYPE_CHECKING:
    from millrace.monitoring.break_even import BreakEven
    from millrace.monitoring.cost_check import Check
    from millrace.monitoring.cost_history import History
    from millrace.monitoring.cost_plan import CostPlan, Inputs, Shortening

cost_app = typer.Typer(help="What an application cost, and what it will.")

Since = Annotated[datetime | None, typer.Option(help="Only from this moment on, UTC; empty: ever.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@cost_app.callback(invoke_without_command=True)
def cost_command(
    context: typer.Context,
    application: ApplicationName = "qa",
    since: Since = None,
    as_json: AsJson = False,
) -> None:
    """What an application cost at its declared prices, by stage and by release; both add up to the total."""
    if context.invoked_subcommand:
        if application != "qa" or since or as_json:
            raise typer.BadParameter(f"options go behind the command: millrace cost {context.invoked_subcommand} …")
        return
    from millrace.monitoring.cost import costs

    with one_sentence():
        settings, declared = declaration(application)
        found = costs(settings, declared, since)
    if as_json:
        print(json.dumps(asdict(found), indent=1, default=str))
        return
    for title, lines in (("stage", found.by_stage), ("release", found.by_release)):
        table = Table(title, "version", "uses", "tokens", "machine", "cost", box=None, pad_edge=False)
        for line in lines:
            used = (f"{line.uses:,}", f"{line.tokens:,}", f"{line.seconds / 60:.1f} min", f"${line.cost_usd:.6f}")
            table.add_row(line.name, line.version, *used)
        console.print(table)
    answers = next((line for line in found.by_stage if line.name == "serving"), None)
    told = f"; {answers.simulated:,} of {answers.uses:,} answers to simulated users" if answers else ""
    console.print(f"${found.total_usd:.6f} in all{told}", markup=False)


@cost_app.command("plan")
def cost_plan(
    application: ApplicationName = "qa",
    queries_per_day: Annotated[float | None, typer.Option(help="The load; empty: as measured.")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(help="Of an answer; empty: as measured.")] = None,
    completion_tokens: Annotated[float | None, typer.Option(help="Of an answer; empty: as measured.")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Of one busy machine; empty: as declared, or as measured.")
    ] = None,
    since: Since = None,
    until: Annotated[datetime | None, typer.Option(help="Only before this moment, UTC; empty: until now.")] = None,
    check: Annotated[
        datetime | None,
        typer.Option(help="Plan from what was before this moment, UTC, and compare with what was recorded from it on."),
    ] = None,
    shorter_prompt: Annotated[
        float | None, typer.Option(help="Share of the prompt's tokens that compression takes; empty: 0.2.")
    ] = None,
    answer_at_most: Annotated[
        int | None, typer.Option(help="Tokens of the longest answer; empty: half of the mean answer's.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw cost by load with the break-even: .svg or .png.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a load will cost a month: own model against paid APIs, where they break even, what shortening saves.

    Prices come from [plan] of the application's declaration; load, tokens and speed from options, or else from what
    was recorded. docs/cost.md has the arithmetic.
    """
    from millrace.monitoring.cost_check import check as compared
    from millrace.monitoring.cost_history import Period, inputs_of, read_history
    from millrace.monitoring.cost_plan import plan
    from millrace.monitoring.cost_plot import plotted, write_plot

    with one_sentence():
        settings, declared = declaration(application)
        lake, period = Lake.of(settings, declared.name), Period.of(since, until)
        given: dict[str, Any] = {
            "queries_per_day": queries_per_day,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "tokens_per_second": tokens_per_second,
        }
        if check is not None:
            if any(one is not None for one in (plot, shorter_prompt, answer_at_most)):
                raise CostError("a check plans no shortening and draws nothing: leave out --check, or the others")
            earlier, later = (read_history(lake, declared.prices, part) for part in period.split(check))
            inputs = inputs_of(earlier, declared.plan, declared.prices, shortest_days=0, **given)
            held = compared(inputs, earlier, later)
            if as_json:
                print(json.dumps(asdict(held), indent=1, default=str))
            else:
                _show_check(held)
            return
        path = plotted(plot) if plot is not None else None
        history = read_history(lake, declared.prices, period)
        inputs = inputs_of(history, declared.plan, declared.prices, **given)
        shorter = 0.2 if shorter_prompt is None else shorter_prompt
        planned = plan(inputs, _shortenings(inputs, history, shorter, answer_at_most))
        if path is not None:
            write_plot(inputs, planned, path)
    if as_json:
        print(json.dumps(asdict(planned) | {"measured": asdict(history)}, indent=1, default=str))
    else:
        _show_plan(planned, inputs, history)
        if path is not None:
            console.print(f"\nDrawn in {path}", markup=False, soft_wrap=True)


def _shortenings(
    inputs: "Inputs", history: "History", shorter: float, answer_at_most: int | None
) -> "list[Shortening]":
    from millrace.monitoring.cost_plan import capped_answers, one_chunk_less, shorter_prompt

    usage, measured = inputs.usage, history.answers
    most = answer_at_most if answer_at_most is not None else max(1, round(usage.completion_tokens / 2))
    one_less = one_chunk_less(usage, measured.chunk_tokens) if measured.chunk_tokens else None
    return [
        *([one_less] if one_less else []),
        shorter_prompt(usage, shorter),
        capped_answers(usage, most, measured.lengths),
    ]


def _show_plan(planned: "CostPlan", inputs: "Inputs", history: "History") -> None:
    _show_basis(planned, inputs, history)
    table = Table(Column("a month", no_wrap=True), "machines", box=None, pad_edge=False)
    for name in ("development", "production", "of it serving", "in all", "per 1,000"):
        table.add_column(name, justify="right")
    for line in planned.lines:
        usd = (line.development_usd, line.production_usd, line.serving_usd, line.month_usd, line.thousand_answers_usd)
        table.add_row(line.name, "" if line.machines is None else f"{line.machines:,}", *map(_usd, usd))
    console.print(table)
    console.print()
    if not planned.break_even:
        console.print("No API is declared in [plan.apis]: nothing to compare the own model with.", markup=False)
    else:
        console.print(f"Cheapest at this load: {planned.cheapest}", markup=False)
    for against in planned.break_even:
        _say(_broken_even(against))
    console.print()
    saved = Table(Column("a month saved by", no_wrap=True), "tokens less", "machine time", box=None, pad_edge=False)
    for line in planned.lines:
        saved.add_column(line.name, justify="right")
    for saving in planned.savings:
        less = f"{saving.prompt_tokens + saving.completion_tokens:,.1f}"
        saved.add_row(saving.name, less, f"-{saving.machine_time:.1%}", *map(_usd, saving.saved_usd.values()))
    console.print(saved)
    if not history.answers.chunk_tokens:
        _say(f"One chunk less: not told by {history.answers.computed:,} computed answers and the chunks still there.")
    if not inputs.speed.told_apart:
        _say(
            "Prompt and completion tokens are taken to need the same machine time: of the own model, a shorter prompt "
            "saves less than is said here, a shorter answer more."
        )


def _show_basis(planned: "CostPlan", inputs: "Inputs", history: "History") -> None:
    answers, usage = history.answers, planned.usage
    _say(
        f"{planned.queries_per_day:,.10g} queries a day; an answer takes {usage.prompt_tokens:,.1f} prompt and "
        f"{usage.completion_tokens:,.1f} completion tokens, {usage.cached_share:.1%} come from the cache"
    )
    _say(
        f"A busy machine does {planned.tokens_per_second:,.1f} tokens/s of these; it carries "
        f"{planned.machine_queries_per_day:,.0f} queries a day, busy at most {inputs.policy.utilisation:.0%} of its "
        f"time, with {inputs.policy.peak_factor:g} times the mean load"
    )
    if answers.count:
        _say(
            f"Measured on {answers.count:,} answers ({answers.simulated:,} to simulated users) over "
            f"{answers.days:.2f} days, {answers.at_once:.1f} computed at once in busy time"
        )
    often = [stage.stage for stage in history.stages if stage.stage not in inputs.policy.monthly]
    if often:
        told = "taken as a month's" if history.days < DAYS else "scaled to a month"
        _say(f"{', '.join(often)}: what was recorded in {history.days:.2f} days is {told}")
    if planned.unknown:
        _say(f"{', '.join(planned.unknown)}: never recorded, so the cost is not known and not counted")
    console.print()


def _broken_even(against: "BreakEven") -> str:
    if not against.changes:
        return f"Break-even with {against.api}: none, {against.at_first} is cheaper at every load"
    told = "; ".join(f"above {change.queries_per_day:,.0f} {change.cheaper}" for change in against.changes)
    if against.for_good is None:
        end = "; and so on, with every machine"
    elif against.for_good_from == against.changes[-1].queries_per_day:
        end = " for good"
    else:
        end = f" …; above {against.for_good_from:,.0f} {against.for_good} for good"
    return f"Break-even with {against.api}, queries a day: at first {against.at_first}; {told}{end}"


def _show_check(held: "Check") -> None:
    _say(f"Planned from {_of_whom(held.planned_from)}")
    _say(f"Recorded in the {held.days:.3f} days after: {_of_whom(held.recorded)}")
    table = Table("what", "unit", box=None, pad_edge=False)
    for name in ("planned", "recorded", "error"):
        table.add_column(name, justify="right")
    for row in held.rows:
        error = "" if row.error is None else f"{row.error:+.1%}"
        table.add_row(row.what, row.unit, _number(row.predicted), _number(row.recorded), error)
    console.print(table)


def _of_whom(by_version: dict[str, int]) -> str:
    told = ", ".join(f"{n:,} of release {version}" for version, n in by_version.items())
    return f"{sum(by_version.values()):,} answers ({told or 'none'})"


def _usd(value: float) -> str:
    return f"${value:,.2f}" if abs(value) >= 1 or not value else f"${value:.4g}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 or not value else f"{value:.6g}"


def _say(told: Any) -> None:
    console.print(told, markup=False, soft_wrap=True)
