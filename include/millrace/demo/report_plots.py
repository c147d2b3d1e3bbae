"""The report's pictures: data in, one SVG element out, so that the page needs neither network nor script."""

from datetime import datetime
from typing import Any

import altair as alt

from millrace.demo.report_model import CriterionEntry, GuardrailEntry, RolloutEntry
from millrace.plots import BLUE, FAINT, GREEN, GREY, RED, data, svg

CHALLENGER, GOOD, BAD, QUIET = BLUE, GREEN, RED, GREY

KIND_COLOURS = {
    "promote": GOOD,
    "skip": GOOD,
    "start": CHALLENGER,
    "advance": CHALLENGER,
    "resume": CHALLENGER,
    "rollback": BAD,
    "freeze": BAD,
}


def share_plot(rollout: RolloutEntry) -> str:
    """Share of traffic over time, a step at each decision."""
    last = _minutes(rollout.started_at, _end(rollout))
    decided = [(_minutes(rollout.started_at, d.decided_at), d) for d in rollout.decisions]
    steps: list[dict[str, Any]] = [{"minutes": minutes, "share": d.share} for minutes, d in decided]
    steps.append({"minutes": last, "share": steps[-1]["share"]})
    taken = [(minutes, d) for minutes, d in decided if d.kind != "hold"]
    x = alt.X("minutes:Q", title="minutes since the rollout began", scale=alt.Scale(nice=False))
    y = alt.Y("share:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1.08], clamp=True))
    line = alt.Chart(data(steps)).mark_line(interpolate="step-after", color=CHALLENGER, strokeWidth=2)
    area = alt.Chart(data(steps)).mark_area(interpolate="step-after", color=CHALLENGER, opacity=0.12)
    colour = alt.Color(
        "kind:N",
        legend=None,
        scale=alt.Scale(domain=list(KIND_COLOURS), range=list(KIND_COLOURS.values())),
    )
    named = alt.Chart(data([{"minutes": minutes, "share": d.share, "kind": d.kind} for minutes, d in taken]))
    points = named.mark_point(filled=True, size=55, opacity=1).encode(x=x, y=y, color=colour)
    words = [
        # A word at the right end stands left of its point, or it would be cut off.
        alt.Chart(
            data(
                [
                    {"minutes": minutes, "share": d.share, "kind": d.kind, "label": f"{d.kind} · {d.share:.0%}"}
                    for minutes, d in taken
                    if (minutes > 0.6 * last) == right
                ]
            )
        )
        .mark_text(align="right" if right else "left", dx=-7 if right else 7, dy=-9, fontSize=12)
        .encode(x=x, y=y, text="label:N", color=colour)
        for right in (False, True)
    ]
    layers = alt.layer(area.encode(x=x, y=y), line.encode(x=x, y=y), points, *words)
    return svg(layers, f"Traffic to version {rollout.challenger}", _of_whom(rollout))


def evidence_plot(rollout: RolloutEntry, guardrail: GuardrailEntry) -> str:
    """The confidence sequence of one guardrail over time, and the harm that has to be excluded."""
    start, known = rollout.started_at, [p for p in guardrail.points if p.low is not None and p.high is not None]
    rows = [
        {"minutes": _minutes(start, p.decided_at), "low": p.low, "high": p.high, "margin": -p.margin}
        | ({} if p.estimate is None else {"estimate": p.estimate})
        for p in known
    ]
    if rows:
        # Before the first user anything is possible.
        rows.insert(0, {"minutes": 0.0, "low": -1.0, "high": 1.0, "margin": rows[0]["margin"]})
    x = alt.X(
        "minutes:Q",
        title="minutes since the rollout began",
        scale=alt.Scale(domain=[0, max(_minutes(start, _end(rollout)), 0.1)], nice=False),
    )
    scale = alt.Scale(domain=[-1, 1], clamp=True)

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=None, scale=scale, axis=alt.Axis(format="+.1f"))

    base = alt.Chart(data(rows))
    band = base.mark_area(color=CHALLENGER, opacity=0.16).encode(x=x, y=y("low"), y2="high:Q")
    edges = [
        base.mark_line(color=CHALLENGER, opacity=0.6, strokeWidth=1).encode(x=x, y=y(side)) for side in ("low", "high")
    ]
    margin = base.mark_line(color=BAD, strokeDash=[4, 3], strokeWidth=1.2, interpolate="step-after").encode(
        x=x, y=y("margin")
    )
    estimated = alt.Chart(data([row for row in rows if "estimate" in row]))
    line = estimated.mark_line(color=CHALLENGER, strokeWidth=2).encode(x=x, y=y("estimate"))
    dots = estimated.mark_point(color=CHALLENGER, filled=True, size=24, opacity=1).encode(x=x, y=y("estimate"))
    zero = alt.Chart(data([{"zero": 0.0}])).mark_rule(color=FAINT, strokeWidth=1).encode(y=y("zero"))
    zero_named = (
        alt.Chart(data([{"zero": 0.0, "said": "no difference"}]))
        .mark_text(align="left", dy=-6, dx=4, fontSize=11, color=FAINT)
        .encode(x=alt.value(0), y=y("zero"), text="said:N")
    )
    margin_named = (
        alt.Chart(data([{"margin": row["margin"], "said": "harm to exclude"} for row in rows[-1:]]))
        .mark_text(align="right", dy=10, dx=-2, fontSize=11, color=BAD)
        .encode(x=alt.value("width"), y=y("margin"), text="said:N")
    )
    last = guardrail.points[-1]
    whom = "simulated users" if rollout.simulated else "users"
    return svg(
        alt.layer(zero, band, *edges, margin, line, dots, zero_named, margin_named),
        f"{guardrail.name.capitalize()}: challenger minus champion",
        f"confidence sequence; {last.champion_users} champion and {last.challenger_users} challenger {whom}",
    )


def criterion_plot(criterion: CriterionEntry) -> str:
    """A small ruler: the interval as a bar, the bound as a tick; the side that isn't allowed is shaded."""
    ratio = criterion.measure == "ratio"
    neutral = 1.0 if ratio else 0.0
    values = [criterion.low, criterion.high, criterion.bound, neutral]
    pad = max((max(values) - min(values)) * 0.15, 0.02)
    left, right = min(values) - pad, max(values) + pad

    def x(value: float) -> float:
        return round(4 + 192 * (value - left) / (right - left), 1)

    low, high, bound, at, zero = (
        x(value) for value in (criterion.low, criterion.high, criterion.bound, criterion.estimate, neutral)
    )
    colour = GOOD if criterion.passed else BAD
    shaded = f'<rect x="{bound}" y="2" width="{200 - bound}" ' if ratio else f'<rect x="0" y="2" width="{bound}" '
    return (
        '<svg class="ruler" viewBox="0 0 200 24" width="200" height="24" role="img" '
        f'aria-label="interval {criterion.low:.3g} to {criterion.high:.3g}, bound {criterion.bound:.3g}">'
        f'{shaded}height="20" fill="{BAD}" opacity="0.10"/>'
        f'<line x1="{zero}" x2="{zero}" y1="2" y2="22" stroke="{QUIET}" stroke-dasharray="2 2"/>'
        f'<line x1="{bound}" x2="{bound}" y1="2" y2="22" stroke="{BAD}" stroke-width="1.5"/>'
        f'<line x1="{low}" x2="{high}" y1="12" y2="12" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        f'<circle cx="{at}" cy="12" r="4" fill="{colour}"/></svg>'
    )


def _of_whom(rollout: RolloutEntry) -> str:
    whom = "simulated users" if rollout.simulated else "users"
    return f"{rollout.users_on_challenger} of {rollout.users} {whom} met it"


def _end(rollout: RolloutEntry) -> datetime:
    return rollout.ended_at or rollout.decisions[-1].decided_at


def _minutes(start: datetime, at: datetime) -> float:
    return round((at - start).total_seconds() / 60, 3)
