"""What a person answered when Airflow asked: who, whether, and why. Nobody decides about what they built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millrace.errors import ApprovalError


@dataclass(frozen=True)
class Answer:
    actor: str
    approved: bool
    reason: str


def read_answer(said: Mapping[str, Any], *, builder: str | None, about: str) -> Answer:
    """
    Args:
        said: `chosen_options`, `params_input` (with `reason`), `responded_by_user` (with `name`), as Airflow's
            human-in-the-loop operators give them.
        builder: the person who built what was asked about; None: no person did.
        about: what that is, for the message.

    Raises:
        ApprovalError: nobody is named, or who answered built it.
    """
    actor = (said["responded_by_user"] or {}).get("name") or ""
    if not actor:
        raise ApprovalError("nobody is named as having answered; log in to Airflow and answer again")
    if actor == builder:
        raise ApprovalError(
            f"{actor} built {about} and can't decide about it: let somebody else answer (clear the task `approve` to "
            "ask again)"
        )
    return Answer(actor, said["chosen_options"] == ["Approve"], said["params_input"].get("reason", ""))
