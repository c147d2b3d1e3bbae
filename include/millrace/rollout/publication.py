"""The split that the gateway follows, made to match the journal; and what is published now.

The tag in the registry acts; the journal is the truth. Knows both, and no reason for either.
"""

from dataclasses import dataclass

from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.releases import published_split
from millrace.releases.split import Split
from millrace.rollout.decisions import fold, read_journal
from millrace.settings import Settings


@dataclass(frozen=True)
class Published:
    """What the registry says."""

    split: Split | None
    champion: str | None
    """Version that the alias `champion` names."""


def published(settings: Settings, application: Application) -> Published:
    """The tag and the alias.

    Raises:
        ReleaseError: the registry does not answer, or the tag can't be understood.
    """
    # The tag first: whoever publishes writes the alias first, so it is never seen behind the tag.
    split = published_split.read_split(settings, application.name)
    return Published(split, published_split.read_aliases(settings, application.name).get("champion"))


def publish(settings: Settings, application: Application) -> None:
    """Write the journal's split to the tag, and again if the journal went on meanwhile: whoever writes last has read
    the journal since, so a slow tick can't leave an older split than a person's rollback published.

    Raises:
        ReleaseError: the registry does not answer.
    """
    lake = Lake.of(settings, application.name)
    state = fold(read_journal(lake))
    while True:
        published_split.publish_split(settings, application.name, state.split(), previous=state.previous)
        now = fold(read_journal(lake))
        if now.split() == state.split():
            return
        state = now
