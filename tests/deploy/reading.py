"""`docker-compose.yaml` as a container engine would understand it, given the variables of an environment.

It knows the format: interpolation, profiles, short forms of ports and volumes. It does not know what is right.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from millrace.settings import PROJECT

IMAGE = "/opt/millrace"
"""Where the image has the repository's root."""
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:-|:\?)([^}]*))?\})")


class Unset(Exception):
    """A variable that the file insists on has no value."""


@dataclass(frozen=True)
class Service:
    """One service. `definition` is interpolated, `source` is as written."""

    name: str
    definition: Mapping[str, Any]
    source: Mapping[str, Any]
    known: Mapping[str, str]
    """Secret of the file → its value."""

    @property
    def ours(self) -> bool:
        return "build" in self.definition

    @property
    def once(self) -> bool:
        """Whether it is one program to complete, rather than a server."""
        return self.definition.get("restart") == "no"

    @property
    def profiles(self) -> frozenset[str]:
        return frozenset(self.definition.get("profiles", ()))

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.definition.get("environment", {}).items()}

    @property
    def secrets(self) -> dict[str, tuple[str, int]]:
        """Path in the container → what the file there holds, and its mode."""
        given = [one if isinstance(one, dict) else {"source": one} for one in self.definition.get("secrets", ())]
        return {
            f"/run/secrets/{one.get('target', one['source'])}": (self.known[one["source"]], one.get("mode", 0o444))
            for one in given
        }

    def told(self, variable: str) -> str | None:
        """What its program reads for a variable, itself or in the file that `<variable>_FILE` names."""
        path = self.environment.get(f"{variable}_FILE", "")
        return self.environment.get(variable) or self.secrets.get(path, (None, 0))[0]

    @property
    def command(self) -> list[str]:
        return [*self.definition.get("entrypoint", ()), *self.definition.get("command", ())]

    @property
    def probe(self) -> list[str]:
        """The command of the health check; empty where there is none."""
        return list(self.definition.get("healthcheck", {}).get("test", ()))[1:]

    @property
    def needs(self) -> dict[str, str]:
        """Service → the condition on which this one waits."""
        return {name: one["condition"] for name, one in self.definition.get("depends_on", {}).items()}

    @property
    def ports(self) -> list[list[str]]:
        """Address, port on the machine, port in the container; fewer parts where the file names fewer."""
        return [str(port).split(":") for port in self.definition.get("ports", ())]

    @property
    def files(self) -> dict[str, Path]:
        """What it sees of the repository: path in the container → path here."""
        return {inside: PROJECT / source for source, inside, *_ in self._mounts if source.startswith(".")}

    @property
    def volumes(self) -> dict[str, str]:
        """Path in the container → named volume."""
        return {inside: source for source, inside, *_ in self._mounts if not source.startswith((".", "/"))}

    @property
    def _mounts(self) -> list[list[str]]:
        return [str(mount).split(":") for mount in self.definition.get("volumes", ())]


@dataclass(frozen=True)
class Compose:
    """A whole file. `text` is as written."""

    text: str
    services: Mapping[str, Service]
    volumes: frozenset[str]

    @classmethod
    def read(cls, text: str, environment: Mapping[str, str]) -> "Compose":
        """Raises:
        Unset: a variable without a value that the file insists on.
        """
        source = yaml.safe_load(text)
        made = _interpolated(source, environment)
        known = {}
        for name, secret in made.get("secrets", {}).items():
            if not environment.get(secret["environment"]):
                raise Unset(f"{secret['environment']}: required by secret {name}")
            known[name] = environment[secret["environment"]]
        services = {
            name: Service(name, definition, source["services"][name], known)
            for name, definition in made["services"].items()
        }
        return cls(text, services, frozenset(made["volumes"]))

    @property
    def ours(self) -> list[Service]:
        return [service for service in self.services.values() if service.ours]

    def started(self, *profiles: str) -> set[str]:
        """Names of the services that these profiles select."""
        return {name for name, one in self.services.items() if not one.profiles or one.profiles & set(profiles)}

    def variables(self) -> dict[str, bool]:
        """Variable that the file reads → whether it insists on a value."""
        found: dict[str, bool] = {}
        for escaped, name, kind, _ in _VARIABLE.findall(self.text):
            if not escaped:
                found[name] = found.get(name, False) or kind != ":-"
        secrets = yaml.safe_load(self.text).get("secrets", {})
        return found | {secret["environment"]: True for secret in secrets.values()}


def _interpolated(value: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _interpolated(one, environment) for name, one in value.items()}
    if isinstance(value, list):
        return [_interpolated(one, environment) for one in value]
    if not isinstance(value, str):
        return value

    def fill(found: re.Match[str]) -> str:
        escaped, name, kind, rest = found.groups()
        if escaped:
            return "$"
        if environment.get(name):
            return environment[name]
        if kind == ":-":
            return rest
        raise Unset(f"{name}: {rest}")

    return _VARIABLE.sub(fill, value)
