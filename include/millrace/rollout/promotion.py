"""From the gate to the rollout: which releases passed, and whether a person has to approve of them first.

An approval is an `admit` in the journal and a refusal a `reject`, with who and why; who built a release can't approve
it. How a person is asked (Airflow's human-in-the-loop operator) is the DAG's business.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import ApprovalError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_EVALUATIONS
from millrace.releases import registry
from millrace.releases.approval import read_answer
from millrace.rollout import people
from millrace.rollout.decisions import Admission, Decision, State, fold, read_journal
from millrace.settings import Settings


def needs_approval(settings: Settings, application: Application) -> bool:
    """Whether a person must approve of a release in this environment before it meets users."""
    return settings.environment in application.promotion.approval_in


def passed_gate(lake: Lake, state: State) -> list[Admission]:
    """Releases that passed the gate against the present champion, at last, and about which nothing was decided yet."""
    columns = ["candidate", "evaluated_at", "passed"]
    rows = lake.read(OPS_EVALUATIONS, columns, where=pc.field("champion") == state.champion).sort_by("evaluated_at")
    last = {row["candidate"]: row for row in rows.to_pylist()}
    known = state.decided | {admission.version for admission in state.waiting}
    return [
        Admission(version, row["evaluated_at"], simulated=False)
        for version, row in last.items()
        if row["passed"] and version not in known
    ]


def next_promotion(settings: Settings, application: Application) -> dict[str, Any] | None:
    """The release that has waited longest since it passed the gate; None: none waits.

    Returns: `candidate`, `champion`, `built_by`, `asks` (the question) and `told`: what a person needs for a decision,
    as Markdown.
    """
    lake = Lake.of(settings, application.name)
    state = fold(read_journal(lake))
    passed = sorted(passed_gate(lake, state), key=lambda admission: admission.at)
    if not passed:
        return None
    version = passed[0].version
    tags = registry.versions(settings, application)[version]
    builder = tags.get(registry.BUILDER_TAG, "")
    return {
        "candidate": version,
        "champion": state.champion,
        "built_by": builder,
        "asks": f"May {application.name}@{version} roll out?",
        "told": (
            f"Release **{application.name}@{version}** (`{tags[registry.RELEASE_TAG]}`) passed the gate against the "
            f"champion, version {state.champion}.\n\nBuilt by {builder or 'the schedule'}, registered by "
            f"`{tags.get(registry.RUN_TAG, '')}`.\n\nThe evaluation: [{settings.mlflow_url}]({settings.mlflow_url}), "
            f"experiment `{application.name}/evaluations`."
        ),
    }


def record_approval(
    settings: Settings, application: Application, version: str, answer: Mapping[str, Any]
) -> Decision | None:
    """Write a person's answer into the journal; None: the journal has it already.

    Args:
        answer: as `read_answer` takes it.

    Raises:
        ApprovalError: nobody is named, who is named is no person where others reach Airflow, who answered built the
            release, or what is approved hasn't passed the gate against the present champion.
        MillraceError: the reason is missing, or the release is not registered.
    """
    builder = registry.versions(settings, application).get(version, {}).get(registry.BUILDER_TAG)
    about = f"version {version} of {application.name}"
    said = read_answer(settings, application.name, answer, builder=builder, resource=f"release/{version}", about=about)
    lake = Lake.of(settings, application.name)
    state = fold(read_journal(lake))
    if version in state.decided or version in {admission.version for admission in state.waiting}:
        return None
    if said.approved and version not in {admission.version for admission in passed_gate(lake, state)}:
        raise ApprovalError(
            f"{about} has not passed the gate against the champion, version {state.champion}; evaluate it again, or "
            "`millrace release admit` lets it past"
        )
    act = people.admit if said.approved else people.reject
    return act(settings, application, version, actor=said.actor, reason=said.reason)
