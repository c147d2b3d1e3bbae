"""What a person answered when Airflow asked: who, whether, and why. Nobody decides about what they built."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from millrace.errors import ApprovalError
from millrace.lakehouse.audit.chain import record_act
from millrace.settings import NOBODY, Settings


@dataclass(frozen=True)
class Answer:
    actor: str
    approved: bool
    reason: str


def read_answer(
    settings: Settings, application: str, said: Mapping[str, Any], *, builder: str | None, resource: str, about: str
) -> Answer:
    """What was answered. That somebody answered who may not is in the audit trail.

    Args:
        said: `chosen_options`, `params_input` (with `reason`), `responded_by_user` (with `name`), as Airflow's
            human-in-the-loop operators give them.
        builder: the person who built what was asked about; None: no person did.
        resource: that, for the audit trail.
        about: and for the message: `version 7 of qa`.

    Raises:
        ApprovalError: nobody is named, who is named is no person where others reach Airflow, or who answered built it.
    """
    actor = (said["responded_by_user"] or {}).get("name") or ""
    if why := _objection(settings, actor, builder, about):
        record_act(
            settings, actor or "nobody", "approval", resource, "refused", at=datetime.now(UTC), application=application
        )
        raise ApprovalError(why)
    return Answer(actor, said["chosen_options"] == ["Approve"], said["params_input"].get("reason", ""))


def _objection(settings: Settings, actor: str, builder: str | None, about: str) -> str | None:
    if not actor:
        return "nobody is named as having answered; log in to Airflow and answer again"
    if settings.reached_by_others and actor.lower() in NOBODY:
        return (
            f"{actor} is no person, and in {settings.environment} only a person decides about {about}: let an operator "
            "or admin of MILLRACE_AIRFLOW_USERS answer (clear the task `approve` to ask again)"
        )
    if builder and actor.lower() == builder.lower():
        return (
            f"{actor} built {about} and can't decide about it: let somebody else answer (clear the task `approve` to "
            "ask again)"
        )
    return None
