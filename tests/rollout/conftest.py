"""The pace of a demo: two steps, short windows."""

import pytest

from millrace.applications import Rollout


@pytest.fixture
def policy() -> Rollout:
    return Rollout.model_validate(
        {
            "steps": [{"share": 0.25, "margin": 0.4}, {"share": 0.5, "margin": 0.3}],
            "window_seconds": 20,
            "minimum_users": 10,
        }
    )
