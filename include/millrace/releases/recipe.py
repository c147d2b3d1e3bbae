"""What made a release, so that another environment can make it again of its own data ("deploy code"): the commit of
the code, the stage, what its run was given, and what the declaration says of that stage. Kept as tags of the version.

It starts no stage and knows no data.
"""

import json
import subprocess
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from millrace.applications import Application
from millrace.errors import ReleaseError
from millrace.settings import PROJECT, Settings

COMMIT_TAG = "millrace.commit"
RECIPE_TAG = "millrace.recipe"
CODE = ("include", "plugins", "dags", "requirements.txt", "pyproject.toml")
"""What of a checkout decides what a stage makes."""
CHANGED = "-changed"
"""Follows the commit of a checkout whose code differs from it."""

Stage = Literal["finetune", "finetune_embedding", "optimize_prompt"]
SECTIONS: dict[Stage, str] = {
    "finetune": "training",
    "finetune_embedding": "embedding_training",
    "optimize_prompt": "optimize",
}
"""Stage → the section of the declaration that is about it."""


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Stage
    form: dict[str, JsonValue]
    """What the run was given; what it leaves out is as declared."""
    declared: dict[str, JsonValue]
    """The section, whole."""

    @classmethod
    def of(cls, application: Application, stage: Stage, form: Mapping[str, Any]) -> Self:
        section = getattr(application, SECTIONS[stage]).model_dump(mode="json")
        return cls(stage=stage, form=dict(form), declared=section)

    @property
    def tags(self) -> dict[str, str]:
        return {RECIPE_TAG: json.dumps(self.model_dump(mode="json"), sort_keys=True)}

    def differences(self, application: Application) -> list[str]:
        """What `application` declares otherwise, each as `training.epochs is 2 and was 1`."""
        name = SECTIONS[self.stage]
        now = Recipe.of(application, self.stage, {}).declared
        return [
            f"{name}.{field} is {now.get(field)!r} and was {self.declared.get(field)!r}"
            for field in sorted(now.keys() | self.declared.keys())
            if now.get(field) != self.declared.get(field)
        ]


def read_recipe(tags: Mapping[str, str], release: str) -> Recipe:
    """What made the release with these tags; `release` names it in errors.

    Raises:
        ReleaseError: they don't say.
    """
    if RECIPE_TAG not in tags:
        raise ReleaseError(
            f"{release} doesn't say how it was made (no tag {RECIPE_TAG}): it is older than that, or no stage trained "
            "it; promote its bytes (`models`), or train it again"
        )
    try:
        return Recipe.model_validate_json(tags[RECIPE_TAG])
    except ValidationError as error:
        raise ReleaseError(
            f"tag {RECIPE_TAG} of {release} can't be understood ({error.errors()[0]['msg']}); another version of "
            "Millrace wrote it: promote its bytes (`models`), or train it again"
        ) from None


def running_commit(settings: Settings) -> str:
    """The commit of this code, with `-changed` where the checkout's code differs from it; empty: nobody knows."""
    if settings.commit:
        return settings.commit
    try:
        where, commit = _git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if where != str(PROJECT):  # Installed below somebody else's checkout.
            return ""
        return commit + (CHANGED if _git("status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit_tag(settings: Settings) -> dict[str, str]:
    commit = running_commit(settings)
    return {COMMIT_TAG: commit} if commit else {}


def _git(*arguments: str) -> str:
    # Without locks: a stage must not make a person's `git commit` beside it fail.
    command = ["git", "--no-optional-locks", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
