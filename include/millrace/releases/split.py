"""Which share of traffic each release gets, and which release one user gets.

Pure. A user's bucket is a salted hash; the challenger has the buckets below its share, so a user who has met the
challenger keeps it while the share grows, and whoever knows split and user knows the arm and its probability.
How a split is published is `published_split.py`'s business; when it changes is the rollout's.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from millrace.errors import ReleaseError

BUCKETS = 10_000

Arm = Literal["champion", "challenger"]


class Split(BaseModel):
    """Who gets what from now on; JSON in one tag, so that it changes in one write."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    sequence: int = Field(ge=0)
    """Number of the decision in the journal that this split follows from."""
    rollout_id: str | None = None
    epoch: int = Field(0, ge=0)
    """Counts the shares of a rollout; exposures are compared within one epoch."""
    champion: str | None
    """Release versions. No champion: nothing is served yet."""
    challenger: str | None = None
    share: float = Field(0.0, ge=0, le=1)
    """Of the challenger."""
    salt: str = ""
    """Of the rollout: users fall into other buckets in the next one."""


@dataclass(frozen=True)
class Assignment:
    """What one user gets. `arm` is None where there is no challenger to be compared with."""

    version: str
    arm: Arm | None
    probability: float
    """With which a user is assigned to the challenger."""
    epoch: int | None
    rollout_id: str | None


def bucket(salt: str, user: str) -> int:
    """0 … 9999, uniform over users, independent between salts."""
    return int.from_bytes(hashlib.sha256(f"{salt}|{user}".encode()).digest()) % BUCKETS


def challenger_buckets(split: Split) -> int:
    """How many buckets the challenger has; 0 without a challenger."""
    return round(split.share * BUCKETS) if split.challenger else 0


def assign(split: Split, user: str) -> Assignment:
    """The release that `user` gets under `split`.

    Raises:
        ReleaseError: there is no champion yet.
    """
    if split.champion is None:
        raise ReleaseError("no release is champion yet; declare one and admit it (`millrace admit`)")
    if split.challenger is None:
        return Assignment(split.champion, None, 0.0, None, split.rollout_id)
    buckets = challenger_buckets(split)
    challenged = bucket(split.salt, user) < buckets
    return Assignment(
        version=split.challenger if challenged else split.champion,
        arm="challenger" if challenged else "champion",
        probability=buckets / BUCKETS,
        epoch=split.epoch,
        rollout_id=split.rollout_id,
    )
