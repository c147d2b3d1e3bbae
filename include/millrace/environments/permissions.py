"""Who may do what in an environment, wall by wall, as it is held now: what is declared doesn't count.

Servers that environments share are asked themselves, with the caller's credential or, where only an administrator may
ask, with what `MILLRACE_ACCESS_SECRETS` has of one. A gateway and an Airflow are one environment's, and nobody else
reaches their stores: of them an environment tells in its lake, by its description and its audit trail.
"""

from contextlib import nullcontext
from datetime import UTC, datetime

from millrace.environments.access import gateway_wall
from millrace.environments.access.matrix import Held, Holding
from millrace.environments.access.walls import WALLS, Deployment, Wall, read_secrets
from millrace.environments.description import recorded_description
from millrace.errors import AccessError, MillraceError
from millrace.settings import Settings


def permissions(settings: Settings, environment: str) -> dict[str, Holding | str]:
    """Wall → who may do what there; or why that isn't known.

    Args:
        settings: the caller's.

    Raises:
        SettingsError: `MILLRACE_ACCESS_SECRETS` can't be read.
    """
    deployment = Deployment(settings, read_secrets(settings), lambda: nullcontext({}))
    return {wall.name: _held(settings, wall, environment) for wall in (make(deployment) for make in WALLS)}


def _held(settings: Settings, wall: Wall, environment: str) -> Holding | str:
    try:
        if wall.held is None:
            return TOLD[wall.name](settings, environment)
        return wall.absent or wall.held(environment)
    except MillraceError as error:
        return str(error)


def _gateway(settings: Settings, environment: str) -> Holding:
    required = recorded_description(settings, environment=environment).keys_required
    if required is None:
        raise AccessError(f"an older Millrace described {environment}; let it run `millrace env record`")
    anybody = [] if required else [Held("whoever shows no key", "", "everything")]
    keys = gateway_wall.held(settings, environment, at=datetime.now(UTC))
    return Holding([*anybody, *keys])


def _airflow(settings: Settings, environment: str) -> Holding:
    logins = recorded_description(settings, environment=environment).logins
    if logins is None:
        raise AccessError(
            f"{environment} wrote down no logins: its Airflow has a login of its own, whoever described it does not "
            "see Airflow's files, or was an older Millrace; let it run `millrace env record` where these files are"
        )
    return Holding([Held(f"login {name}", "", role) for name, role in logins.items()])


TOLD = {"gateway": _gateway, "airflow": _airflow}
"""Wall that each environment has to itself → what it tells of it."""
