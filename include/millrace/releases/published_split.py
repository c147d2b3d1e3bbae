"""What users are given, in the MLflow registry: a tag of the application's registered model, `millrace.split`, on which
the gateway acts, and the aliases that say it to people. It knows no release's bytes (`registry.py`).
"""

from typing import Any

from pydantic import ValidationError

from millrace.errors import ReleaseError
from millrace.releases.mlflow_server import found_or_none, mlflow_client
from millrace.releases.split import Split
from millrace.settings import Settings

SPLIT_TAG = "millrace.split"


def read_split(settings: Settings, application: str) -> Split | None:
    """The published split; None: nothing was published yet.

    Raises:
        ReleaseError: the tag can't be understood, or MLflow doesn't answer.
    """
    with mlflow_client(settings, f"read the split of {application}") as client:
        model = _model(settings, client, application)
        text = model.tags.get(SPLIT_TAG) if model else None
    if text is None:
        return None
    try:
        return Split.model_validate_json(text)
    except ValidationError as error:
        raise ReleaseError(
            f"tag {SPLIT_TAG} of registered model {application} is not a split ({error.errors()[0]['msg']}): "
            f"{text[:200]!r}; freeze and resume the rollout to write it again from the journal"
        ) from None


def answering_now(settings: Settings, application: str) -> set[str]:
    """The versions that users are given. Raises as `read_split`."""
    split = read_split(settings, application)
    return {version for version in (split.champion, split.challenger) if version} if split else set()


def publish_split(settings: Settings, application: str, split: Split, *, previous: str | None = None) -> None:
    """Set the aliases that people read (champion, challenger, previous), then publish `split` in one write.

    The tag acts and comes last: where it is the journal's, the aliases were set too, so an alias that differs then
    was moved by a person, not left behind by a crash.
    """
    with mlflow_client(settings, f"publish the split of {application}") as client:
        ensure_model(settings, client, application, None)
        named = _aliases(_model(settings, client, application))
        for alias, version in {
            "champion": split.champion,
            "challenger": split.challenger,
            "previous": previous,
        }.items():
            if version is None and alias in named:
                client.delete_registered_model_alias(application, alias)
            elif version is not None and named.get(alias) != version:
                client.set_registered_model_alias(application, alias, version)
        client.set_registered_model_tag(application, SPLIT_TAG, split.model_dump_json())


def read_aliases(settings: Settings, application: str) -> dict[str, str]:
    """Alias → version, as it stands; a person may have moved one."""
    with mlflow_client(settings, f"read the aliases of {application}") as client:
        return _aliases(_model(settings, client, application))


def _model(settings: Settings, client: Any, application: str) -> Any | None:
    return found_or_none(settings, lambda: client.get_registered_model(application))


def _aliases(model: Any | None) -> dict[str, str]:
    return {alias: str(version) for alias, version in model.aliases.items()} if model else {}


def ensure_model(settings: Settings, client: Any, application: str, description: str | None) -> None:
    """Create the registered model of `application` where it is missing."""
    from mlflow.exceptions import MlflowException

    if _model(settings, client, application):
        return
    try:
        client.create_registered_model(application, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
