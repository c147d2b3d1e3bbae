"""What is in a lake beside the environments, and whose it is. An environment's own tables are at its name."""

SAMPLE = "sample"
"""What prod shows staging of its tables: `environments/sample.py` puts it there."""

OWNERS = {SAMPLE: "prod"}
"""Place → the environment that writes there."""


def owner(place: str) -> str:
    """The environment that writes to a place, or to its own."""
    return OWNERS.get(place, place)
