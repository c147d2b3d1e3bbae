"""What must hold between `docker-compose.yaml` and the code: each check returns a sentence for every breach."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import yaml
from pydantic import SecretStr

from millrace.errors import SettingsError
from millrace.settings import Settings, read_settings
from millrace.stack.home import obtain_secrets
from millrace.stack.part import Part
from millrace.stack.parts import all_parts
from tests.deploy.reading import IMAGE, Compose, Service

BINARIES = Path(sys.executable).parent
EMBEDDED = {
    "airflow-database": "airflow-init",
    "airflow": "airflow-api-server",
    "airflow-scheduler": "airflow-scheduler",
    "airflow-dag-processor": "airflow-dag-processor",
    "airflow-triggerer": "airflow-triggerer",
    "airflow-history": "airflow-history",
    "spark": "spark",
    "gateway": "gateway",
}
"""Part of the embedded stack → the service of ours that stands for it."""
KEEPERS = frozenset(
    {
        "airflow-scheduler", "airflow-worker", "airflow-worker-heavy", "gateway", "gateway-2", "spark", "spark-master",
        "spark-worker-1", "spark-worker-2",
    }
)  # fmt: skip
"""Services that write to the home, or look for the lake there."""
OF_THE_PLACE = frozenset(
    {
        "PATH", "VIRTUAL_ENV", "NO_PROXY", "no_proxy", "MLFLOW_TRACKING_URI", "SPARK_HOME", "SPARK_LOCAL_IP",
        "PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON", "TZ", "AIRFLOW_HOME", "AIRFLOW__CORE__DAGS_FOLDER",
        "AIRFLOW__CORE__PLUGINS_FOLDER", "AIRFLOW__CORE__FERNET_KEY", "AIRFLOW__API__SECRET_KEY",
        "AIRFLOW__API_AUTH__JWT_SECRET", "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL", "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "AIRFLOW__API__HOST",
        "AIRFLOW__API__BASE_URL", "AIRFLOW__LOGGING__BASE_LOG_FOLDER",
    }
)  # fmt: skip
"""Variables whose values are addresses, folders and secrets, which differ between a process and a container."""
_BESIDE_CORE = frozenset({"spark-cluster", "celery", "gateways"})
"""Profiles that are started with core, and nothing without it."""
_NOTHING_TO_ASK = frozenset({"otel-collector", "airflow-history"})
"""One has no program that could ask it, the other serves nobody: it ends when it fails, and is started again."""
_NOT_NEEDED = {
    ("gateway", "spark_token"), ("gateway", "spark_secret"), ("airflow-scheduler", "spark_secret"),
    ("airflow-scheduler", "keys_url"), ("airflow-scheduler", "api_key"),
    ("gateway", "backup_airflow_url"), ("gateway", "backup_mlflow_url"),
    ("airflow-scheduler", "backup_airflow_url"), ("airflow-scheduler", "backup_mlflow_url"),
    *((part, name) for part in ("airflow-scheduler", "gateway") for name in ("postgres_url", "access_secrets")),
    ("airflow-scheduler", "airflow_passwords"), ("gateway", "airflow_passwords"),
}  # fmt: skip
"""Serving never asks Spark, no task the gateway; a cluster knows one client, the Connect server; and neither makes
backups, puts up walls or logs people in."""
CELERY = frozenset({"AIRFLOW__CELERY__BROKER_URL", "AIRFLOW__CELERY__RESULT_BACKEND"})
"""Options of the provider, which isn't in the lock; tests/executors looks for them in it."""
_ELSEWHERE = ("_uri", "_url", "_urls", "_remote")
_SECRET = re.compile(r"(PASSWORD|SECRET|TOKEN|KEY|CONN|BACKEND_STORE_URI|KEYS_URL|BACKUP_\w+_URL)$")
_NOT_SECRET = {"AWS_ACCESS_KEY_ID", "ROOT_ACCESS_KEY"}
_FROM_OUTSIDE = re.compile(r"\$\{\w+(:\?[^}]*|:-)\}")
"""A variable that must have a value, or may be empty: not one with a value in the file."""
_FLOATING = re.compile(r"(latest|main|master|nightly|dev|stable|edge)\b")


def settings_of(service: Service) -> Settings:
    """The settings as the service's program reads them.

    Raises:
        SettingsError: a variable is unknown or has no valid value.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(service.environment)
        for number, (variable, path) in enumerate(service.environment.items()):
            if variable.endswith("_FILE") and path in service.secrets:
                content, mode = service.secrets[path]
                file = Path(folder) / str(number)
                file.write_text(content)
                file.chmod(mode)
                environment[variable] = str(file)
        with mock.patch.dict(os.environ, environment, clear=True):
            return read_settings()


def settings(compose: Compose) -> Iterator[str]:
    """Every `MILLRACE_` variable is one that the code reads, with a value that it takes, and none is missing."""
    for service in compose.ours:
        try:
            read = settings_of(service)
        except SettingsError as error:
            yield f"{service.name}: {error}"
            return
        for name in ("mlflow_uri", "spark_remote", "qdrant_url"):
            if not getattr(read, name) and not (name == "spark_remote" and service.name.startswith("spark")):
                yield f"{service.name} would look for an embedded part: it has no MILLRACE_{name.upper()}"
    for name, field in Settings.model_fields.items():
        if field.annotation is SecretStr or name.endswith(_ELSEWHERE):
            for service in ("airflow-scheduler", "gateway"):
                variable = f"MILLRACE_{name.upper()}"
                given = compose.services[service].environment
                if not {variable, f"{variable}_FILE"} & given.keys() and (service, name) not in _NOT_NEEDED:
                    yield f"{service} has no {variable}"
    for server in ("gateway", "gateway-2", "spark"):
        if settings_of(compose.services[server]).listens_on != "0.0.0.0":
            yield f"{server} listens where no other container reaches it"


def embedded_parts(folder: Path) -> dict[str, Part]:
    """The embedded stack's parts, with the threads that the compose file gives by default and every secret filled."""
    known = Settings(home=folder, threads=2)
    filled = {
        name: SecretStr(f"secret-{name}")
        for name, field in Settings.model_fields.items()
        if field.annotation is SecretStr
    }
    with mock.patch.dict(os.environ, {"PATH": os.environ["PATH"]}, clear=True):
        return {part.name: part for part in all_parts(known.model_copy(update=filled), obtain_secrets(folder))}


def as_embedded(compose: Compose) -> Iterator[str]:
    """Each service of ours runs what the part of the embedded stack runs, configured alike, with no more secrets."""
    with tempfile.TemporaryDirectory() as folder:
        parts = embedded_parts(Path(folder))
    for part_name, name in EMBEDDED.items():
        part, service = parts[part_name], compose.services[name]
        given = {variable: value for variable, value in part.environment.items() if not _is_setting(variable)}
        for variable, value in given.items():
            if variable in OF_THE_PLACE and variable not in service.environment:
                if variable.startswith("AIRFLOW"):
                    yield f"{name} has no {variable}"
            elif variable in OF_THE_PLACE or variable.startswith("SPARK_"):
                continue
            elif service.environment.get(variable) != value:
                yield f"{name} has {variable}={service.environment.get(variable)}, the embedded stack {value}"
        allowed = {variable for variable, value in part.environment.items() if value.startswith("secret-")}
        if "SPARK_CONNECT_AUTHENTICATE_TOKEN" in allowed:
            # Where the lake is a folder, as it is in that stack, the embedded one gets no credential for another.
            allowed |= {"MILLRACE_SPARK_TOKEN", "MILLRACE_SPARK_SECRET"}
            allowed |= {"MILLRACE_LAKE_ACCESS_KEY", "MILLRACE_LAKE_SECRET_KEY"}
        if part_name == "airflow-database":
            # What it changes of logins goes into the audit trail; the embedded stack itself does that.
            allowed |= {"MILLRACE_LAKE_ACCESS_KEY", "MILLRACE_LAKE_SECRET_KEY"}
        secret = {
            f"MILLRACE_{n.upper()}" for n, field in Settings.model_fields.items() if field.annotation is SecretStr
        }
        held = {variable.removesuffix("_FILE") for variable in service.environment}
        held |= {f"MILLRACE_{Path(path).name.upper()}" for path in service.secrets}
        for variable in sorted(held & secret - allowed):
            yield f"{name} has {variable}, which the embedded {part_name} isn't told"
        ours = list(part.command[3:] if part.command[2] == "airflow" else part.command[1:])
        if part_name.startswith("airflow") and not part.once and service.command[1:] != ours:
            yield f"{name} runs {service.command}, the embedded stack {part.command[2:]}"
    flags = {argument.partition("=")[0] for argument in compose.services["mlflow"].command}
    wanted = {argument for argument in parts["mlflow"].command if argument.startswith("--")}
    for flag in sorted(wanted - flags - {"--backend-store-uri"}):
        yield f"mlflow has no {flag}"


def airflow_options(compose: Compose) -> Iterator[str]:
    """Every `AIRFLOW__SECTION__OPTION` is one of Airflow's."""
    known = known_airflow_options()
    for service in compose.services.values():
        for variable in service.environment:
            if variable.startswith("AIRFLOW__") and variable not in known | CELERY:
                yield f"{service.name}: Airflow has no option {variable}"


@cache
def known_airflow_options() -> frozenset[str]:
    """As Airflow's own reference lists them."""
    reference = yaml.safe_load((airflow_package() / "config_templates" / "config.yml").read_text())
    return frozenset(
        f"AIRFLOW__{section}__{option}".upper() for section, body in reference.items() for option in body["options"]
    )


def airflow_package() -> Path:
    """Its folder, found without importing it."""
    spec = importlib.util.find_spec("airflow")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def commands(compose: Compose) -> Iterator[str]:
    """Every program that our image or MLflow's is told to run exists, with these subcommands and options."""
    airflow: dict[tuple[str, ...], str] = {}
    for service in compose.ours:
        for command in filter(None, (service.command, service.probe)):
            calls = airflow_calls(service, command)
            if command[0] == "celery" or (calls and calls[0][0] == "celery"):
                continue  # the provider's own; tests/executors runs it
            airflow |= dict.fromkeys(calls, service.name)
            if not calls and (problem := refused(command)):
                yield f"{service.name}: {problem}"
    for call, problem in refused_by_airflow(frozenset(airflow)).items():
        yield f"{airflow[call]}: airflow {' '.join(call)}: {problem}"
    for problem in refused_by_mlflow(compose.services["mlflow"]):
        yield f"mlflow: {problem}"


def refused(command: list[str]) -> str | None:
    match command:
        case ["python", "-m", module, *_]:
            return None if _runs(module) else f"python -m {module} runs nothing"
        case ["python", "-c", program, *_]:
            compile(program, "<health check>", "exec")
            return None
        case [program, *_]:
            return None if (BINARIES / program).exists() else f"there is no program {program}"
    return "an empty command"


def _runs(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    return spec is not None and spec.origin is not None and '__name__ == "__main__"' in Path(spec.origin).read_text()


def airflow_calls(service: Service, command: list[str]) -> list[tuple[str, ...]]:
    """The arguments with which the command calls Airflow's program, itself or in a mounted script."""
    match command:
        case ["airflow", *arguments]:
            return [tuple(arguments)]
        case ["sh", path]:
            script = service.files[path]
            subprocess.run(["sh", "-n", str(script)], check=True)
            found = re.findall(r"\bairflow (.+?)(?:$|>|\|\|)", re.sub(r"#.*", "", script.read_text()), re.MULTILINE)
            return [tuple(shlex.split(call)) for call in found]
    return []


@cache
def refused_by_airflow(calls: frozenset[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Call → what Airflow's own parser says against it, for those that it doesn't take."""
    program = (
        "import contextlib, io, json, sys\n"
        "from airflow.cli.cli_parser import get_parser\n"
        "parser, said = get_parser(), []\n"
        "for call in json.load(sys.stdin):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.suppress(SystemExit):\n"
        "        parser.parse_args(call)\n"
        "    said.append(error.getvalue())\n"
        "print(json.dumps(said))"
    )
    asked = sorted(calls)
    with tempfile.TemporaryDirectory() as home:
        answer = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(asked),
            env={"PATH": os.environ["PATH"], "AIRFLOW_HOME": home},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    said = json.loads(answer.stdout.splitlines()[-1])
    return {call: error.strip()[-300:] for call, error in zip(asked, said, strict=True) if error}


def refused_by_mlflow(service: Service) -> Iterator[str]:
    import click
    from mlflow import environment_variables
    from mlflow.cli import server
    from mlflow.server.security_utils import is_allowed_host_header

    program, subcommand, *arguments = service.command
    if (program, subcommand) != ("mlflow", "server"):
        yield f"{program} {subcommand} is not the server"
    options: Mapping[str, object] = {}
    try:
        with mock.patch.dict(os.environ, service.environment):
            options = server.make_context("server", list(arguments)).params
    except click.ClickException as error:
        yield error.format_message()
    known = {option.envvar for option in server.params if option.envvar}
    for variable in service.environment:
        if variable.startswith("MLFLOW_") and variable not in known and not hasattr(environment_variables, variable):
            yield f"MLflow doesn't know {variable}"
    hosts = str(options.get("allowed_hosts")).split(",")
    for host in ("mlflow:5000", "127.0.0.1:5000", "localhost:5055"):
        if not is_allowed_host_header(hosts, host):
            yield f"whoever asks as {host} is refused"


def addresses(compose: Compose) -> Iterator[str]:
    """Every address that a service of ours is given is one at which another service listens."""
    ports = {
        "mlflow": _option(compose.services["mlflow"], "--port"),
        "spark": str(settings_of(compose.services["spark"]).spark_port),
        "gateway": str(settings_of(compose.services["gateway"]).gateway_port),
        "airflow-api-server": compose.services["airflow-api-server"].environment["AIRFLOW__API__PORT"],
        "object-store": _option(compose.services["object-store"], "--port").removeprefix(":"),
        "qdrant": "6333",
        "vllm": _option(compose.services["vllm"], "--port"),
        "postgres": "5432",
        "otel-collector": "4318",
        "prometheus": "9090",
        "grafana": "3000",
        "gateway-2": str(settings_of(compose.services["gateway-2"]).gateway_port),
        "spark-master": str(settings_of(compose.services["spark-master"]).spark_master_port),
        "redis": "6379",
        "gateways": "8080",
    }
    for service in compose.services.values():
        for variable, value in service.environment.items():
            address = urlsplit(value)
            if endpoint := re.search(r"endpoint_override=([\w.:-]+)", address.query):
                address = urlsplit(f"//{endpoint[1]}")
            if "://" not in value or address.hostname in ("127.0.0.1", None):
                continue
            expected = ports.get(str(address.hostname))
            if expected is None:
                yield f"{service.name}: {variable} names {address.hostname}, which is no service"
            elif str(address.port or "5432") != expected:
                yield f"{service.name}: {variable} asks {address.hostname} at {address.port}, it listens at {expected}"
        for host, port in re.findall(r"http://([\w.-]+):(\d+)", " ".join(service.probe)):
            if port != ports.get(service.name if host == "127.0.0.1" else host):
                yield f"{service.name}: its health check asks {host} at {port}"
        for _, _, inside in service.ports if service.name in ports else ():
            if inside != ports[service.name]:
                yield f"{service.name} publishes {inside} and listens at {ports[service.name]}"
    for one, other in (
        (("gateway", "MILLRACE_QDRANT_API_KEY"), ("qdrant", "QDRANT__SERVICE__API_KEY")),
        (("airflow-scheduler", "MILLRACE_SPARK_TOKEN"), ("spark", "MILLRACE_SPARK_TOKEN")),
        (("airflow-worker", "MILLRACE_SPARK_TOKEN"), ("spark", "MILLRACE_SPARK_TOKEN")),
        (("airflow-worker-heavy", "MILLRACE_PSEUDONYM_KEY"), ("gateway", "MILLRACE_PSEUDONYM_KEY")),
        (("gateway-2", "MILLRACE_PSEUDONYM_KEY"), ("gateway", "MILLRACE_PSEUDONYM_KEY")),
        (("gateway-2", "MILLRACE_COMPLETION_KEY"), ("gateway", "MILLRACE_COMPLETION_KEY")),
        (("gateway-2", "MILLRACE_KEYS_URL"), ("gateway", "MILLRACE_KEYS_URL")),
        (("spark-master", "MILLRACE_SPARK_SECRET"), ("spark", "MILLRACE_SPARK_SECRET")),
        (("spark-worker-2", "MILLRACE_SPARK_SECRET"), ("spark", "MILLRACE_SPARK_SECRET")),
        (("airflow-scheduler", "MILLRACE_PSEUDONYM_KEY"), ("gateway", "MILLRACE_PSEUDONYM_KEY")),
        (("airflow-scheduler", "MILLRACE_COMPLETION_KEY"), ("gateway", "MILLRACE_COMPLETION_KEY")),
        (("mlflow", "AWS_SECRET_ACCESS_KEY"), ("object-store", "ROOT_SECRET_KEY")),
        (("mlflow", "AWS_ACCESS_KEY_ID"), ("object-store", "ROOT_ACCESS_KEY")),
        (("backup", "AWS_SECRET_ACCESS_KEY"), ("object-store", "ROOT_SECRET_KEY")),
        (("backup", "MILLRACE_BACKUP_MLFLOW_URL"), ("mlflow", "MLFLOW_BACKEND_STORE_URI")),
        (("backup", "MILLRACE_BACKUP_AIRFLOW_URL"), ("airflow-init", "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN")),
        (("backup", "MILLRACE_KEYS_URL"), ("gateway", "MILLRACE_KEYS_URL")),
    ):
        if len({compose.services[service].told(variable) for service, variable in (one, other)}) != 1:
            yield f"{one} and {other} differ"


def _option(service: Service, name: str) -> str:
    """The value of an option, written as `--name=value` or `--name value`."""
    command = service.command
    for position, argument in enumerate(command):
        if argument == name:
            return command[position + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return ""


def exposure(compose: Compose) -> Iterator[str]:
    """Ports on this machine only, secrets from the environment only, images of one version, limits everywhere."""
    for service in compose.services.values():
        for port in service.ports:
            if len(port) != 3 or port[0] != "127.0.0.1":
                yield f"{service.name} publishes {':'.join(port)} beyond 127.0.0.1"
        image = service.definition["image"]
        tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
        if not re.search(r"\d+\.\d+", tag) or _FLOATING.search(tag):
            yield f"{service.name} runs {image}, which names no version"
        for variable, value in service.source.get("environment", {}).items():
            if _SECRET.search(variable) and variable not in _NOT_SECRET and not _FROM_OUTSIDE.search(str(value)):
                yield f"{service.name} has its {variable} in the file"
        if "memory" not in service.definition.get("deploy", {}).get("resources", {}).get("limits", {}):
            yield f"{service.name} may take all memory"
        if service.definition.get("privileged") or service.definition.get("network_mode") == "host":
            yield f"{service.name} is not contained"


def lifecycle(compose: Compose) -> Iterator[str]:
    """Whoever is waited for exists in the same profiles and can say what is waited for; servers come back."""
    for service in compose.services.values():
        for needed, condition in service.needs.items():
            other = compose.services.get(needed)
            if other is None:
                yield f"{service.name} waits for {needed}, which is no service"
            elif not other.profiles >= service.profiles and not (
                service.profiles <= _BESIDE_CORE and "core" in other.profiles
            ):
                yield f"{service.name} waits for {needed}, which its profile doesn't start"
            elif condition != ("service_completed_successfully" if other.once else "service_healthy"):
                yield f"{service.name} waits for {needed} to be {condition}"
        if not service.once:
            if service.definition.get("restart") != "unless-stopped":
                yield f"{service.name} doesn't come back"
            if not service.probe and service.name not in _NOTHING_TO_ASK:
                yield f"{service.name} has no health check"


def files(compose: Compose) -> Iterator[str]:
    """Every file that is mounted is in the repository, and named volumes are declared and used."""
    used = set()
    for service in compose.services.values():
        for path in service.files.values():
            if not path.exists():
                yield f"{service.name} mounts {path}, which isn't there"
        used |= set(service.volumes.values())
    for name in sorted(used ^ compose.volumes):
        yield f"volume {name} is {'not declared' if name in used else 'used by nobody'}"
    for service in compose.ours:
        for variable in ("AIRFLOW__CORE__DAGS_FOLDER", "AIRFLOW__CORE__PLUGINS_FOLDER"):
            folder = service.environment.get(variable, f"{IMAGE}/dags")
            if Path(folder).parent != Path(IMAGE):
                yield f"{service.name} looks for {variable} in {folder}, the image has it under {IMAGE}"
        read = settings_of(service)
        for variable, folder in (("home", read.home), ("cache", read.cache)):
            if service.name in KEEPERS and str(folder) not in service.volumes:
                yield f"{service.name} would lose its {variable} {folder} with the container"


def _is_setting(variable: str) -> bool:
    return variable.startswith("MILLRACE_")
