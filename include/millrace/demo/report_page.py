"""The report as one HTML file: everything inside, no script, nothing fetched. Knows the data and the template."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from millrace.demo.report_model import Report, RolloutEntry
from millrace.demo.report_plots import criterion_plot, evidence_plot, share_plot

TEMPLATE = Path(__file__).with_name("report.html.j2")
OUTCOMES = {
    "promote": ("promoted to everybody", "good"),
    "skip": ("promoted by a person", "good"),
    "rollback": ("rolled back", "bad"),
    "running": ("still running", "quiet"),
}
MEANINGS = {
    "quality": "mean rating",
    "success": "answered by its own release",
    "latency": "answered within the budget",
}
"""Guardrail → what its means are the mean of; in this order."""
STATES = {"done": "good", "nothing new": "good", "refused": "warn", "failed": "bad"}


def render_page(report: Report) -> str:
    """The HTML of `report`."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": _duration,
        "usd": _usd,
        "memory": _memory,
        "signed": _signed,
        "rate": _rate,
        "measured": _measured,
    }
    spent = sum(stage.seconds for stage in report.stages)
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report,
        stages=_placed(report),
        spent=spent,
        elapsed=(report.finished_at - report.started_at).total_seconds(),
        gates=[
            (gate, [(c, Markup(criterion_plot(c)) if c.measure != "count" else "") for c in gate.criteria])
            for gate in report.gates
        ],
        rollouts=[_shown(rollout) for rollout in report.rollouts],
        bad=[rollout for rollout in report.rollouts if rollout.outcome == "rollback"],
        outcomes=OUTCOMES,
        meanings=MEANINGS,
    )


def _shown(rollout: RolloutEntry) -> dict[str, Any]:
    order = list(MEANINGS)
    guardrails = sorted(rollout.guardrails, key=lambda g: order.index(g.name) if g.name in order else len(order))
    return {
        "rollout": rollout,
        "share": Markup(share_plot(rollout)),
        "evidence": Markup(evidence_plot(rollout, guardrails[0])) if guardrails else "",
        "guardrails": [(guardrail, guardrail.points[-1]) for guardrail in guardrails],
        "decisions": _folded(rollout),
    }


def _folded(rollout: RolloutEntry) -> list[dict[str, Any]]:
    """The decisions, a run of holds as one line: its last, with their number."""
    lines: list[dict[str, Any]] = []
    for decision in rollout.decisions:
        same = lines and decision.kind == "hold" == lines[-1]["decision"].kind
        if same:
            lines[-1] = {"decision": decision, "times": lines[-1]["times"] + 1, "after": lines[-1]["after"]}
        else:
            after = (decision.decided_at - rollout.started_at).total_seconds()
            lines.append({"decision": decision, "times": 1, "after": after})
    return lines


def _placed(report: Report) -> list[dict[str, Any]]:
    """Stages with where their bar begins and how long it is, in percent of the whole."""
    total = sum(stage.seconds for stage in report.stages) or 1.0
    placed, at = [], 0.0
    for stage in report.stages:
        width = 100 * stage.seconds / total
        placed.append({"stage": stage, "left": at, "width": width, "tone": STATES.get(stage.state, "quiet")})
        at += width
    return placed


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else str(timedelta(seconds=round(seconds)))


def _usd(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 1 else f"${amount:.5f}"


def _memory(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _measured(value: float, criterion: str) -> str:
    """A criterion's mean in its own unit."""
    match criterion:
        case "latency":
            return f"{value:.2f} s"
        case "cost":
            return f"${value * 1e6:.3g} / 1M"
    return f"{value:.3f}"
