"""The release that an application's declaration describes, registered. Signatures first."""

from typing import Any

from millrace.applications import Application
from millrace.settings import Settings

DECLARED = "declared"


def declare_release(settings: Settings, application: Application, *, variant: str | None, run: str) -> dict[str, Any]:
    """{"version", "release_id", "changed"}."""
    raise NotImplementedError
