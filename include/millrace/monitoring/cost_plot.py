"""The picture of a plan of costs: dollars a month by load, and where the cheaper way changes."""

import os
from pathlib import Path
from typing import Any

import altair as alt

from millrace.errors import CostError
from millrace.monitoring.break_even import OwnModel, PaidApi
from millrace.monitoring.cost_plan import CostPlan, Inputs, options
from millrace.plots import BLUE, FAINT, GREEN, GREY, RED, data, png, svg

FORMATS = (".svg", ".png")
WIDTH, HEIGHT = 760, 420
STEPS = 200
"""Of the own model's staircase that are drawn one by one; beyond, on this scale, it is a line."""
POINTS = 200
"""Loads in a curve."""
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]


def plotted(path: Path) -> Path:
    """`path` itself.

    Raises:
        CostError: its ending says no format that can be drawn, or its folder isn't there.
    """
    if path.suffix.lower() not in FORMATS:
        raise CostError(f"{path} can't be drawn: end its name with {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise CostError(f"{path.parent} is not a folder: make it, or give another path")
    return path


def write_plot(inputs: Inputs, planned: CostPlan, path: Path) -> None:
    """Draw `planned`, made from `inputs`, into `path`: an SVG or a PNG by its ending, whole or not at all.

    Raises:
        CostError: `path` can't be drawn to (`plotted`), or written.
    """
    chart, title = _chart(inputs, planned), "What answering costs a month"
    subtitle = f"{planned.usage.prompt_tokens:.0f} prompt and {planned.usage.completion_tokens:.0f} completion tokens"
    drawn = (
        png(chart, title, subtitle, WIDTH, HEIGHT)
        if plotted(path).suffix.lower() == ".png"
        else svg(chart, title, subtitle, WIDTH, HEIGHT).encode()
    )
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(drawn)
        beside.replace(path)
    except OSError as error:
        raise CostError(f"{path} can't be written: {error.strerror}; give another path") from None
    finally:
        beside.unlink(missing_ok=True)


def _chart(inputs: Inputs, planned: CostPlan) -> Any:
    own, apis = options(inputs, planned.usage)
    ways: list[OwnModel | PaidApi] = [own, *apis]
    met = [change.queries_per_day for against in planned.break_even for change in against.changes]
    load = planned.queries_per_day
    low, high = min([load, *met]) / 4, max([load, *met]) * 4
    curves = [
        {"load": at, "usd": usd, "way": way.name}
        for way in ways
        for at, usd in _curve(way, low, high)
        if usd > 0  # a logarithmic scale has no 0
    ]
    points = [{"load": at, "usd": own.month_usd(at)} for at in sorted(set(met)) if own.month_usd(at) > 0]
    x = alt.X(
        "load:Q",
        title="queries a day",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(format="~s"),
    )
    y = alt.Y("usd:Q", title="US dollars a month", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s"))
    names = [way.name for way in ways]
    colours = [BLUE, RED, GREEN, GREY]
    colour = alt.Color("way:N", title=None, scale=alt.Scale(domain=names, range=_as_many(colours, names)))
    dash = alt.StrokeDash("way:N", title=None, scale=alt.Scale(domain=names, range=_as_many(DASHES, names)))
    drawn = alt.Chart(data(curves)).mark_line(strokeWidth=2, clip=True)
    lines = drawn.encode(x=x, y=y, color=colour, strokeDash=dash)
    crossings = alt.Chart(data(points)).mark_point(filled=True, size=50, color=FAINT, opacity=1).encode(x=x, y=y)
    planned_at = alt.Chart(data([{"load": load, "said": "planned"}]))
    rule = planned_at.mark_rule(color=FAINT, strokeDash=[4, 3]).encode(x=x)
    said = planned_at.mark_text(align="left", dx=4, fontSize=11, color=FAINT).encode(x=x, y=alt.value(8), text="said:N")
    return alt.layer(rule, lines, crossings, said)


def _curve(way: OwnModel | PaidApi, low: float, high: float) -> list[tuple[float, float]]:
    loads = {low * (high / low) ** (i / (POINTS - 1)) for i in range(POINTS)}
    if isinstance(way, OwnModel):
        ends = (machines * way.capacity for machines in range(way.machines(low), way.machines(low) + STEPS))
        # Both sides of each step, so that it is drawn upright.
        loads |= {at for end in ends if end < high for at in (end, end * (1 + 1e-6))}
    return [(load, way.month_usd(load)) for load in sorted(loads)]


def _as_many(values: list[Any], names: list[str]) -> list[Any]:
    return [values[i % len(values)] for i in range(len(names))]
