"""Every part of the stack as a value: its command, its environment, what it needs first, how to ask whether it works.

Building a part starts nothing. What differs between two deployments comes from the settings and the secrets.
"""

import http.client
import json
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from pydantic import SecretStr

from millrace.lakehouse import spark_server
from millrace.private_files import write_json
from millrace.secret_sources import is_set
from millrace.settings import PROJECT, Settings
from millrace.stack.environment import part_environment
from millrace.stack.home import Secrets, registry_mark
from millrace.stack.postgres import Postgres

_KEYS_DATABASE = "gateway"
ADMIN = "admin"
"""Airflow's one user."""


def _nothing() -> None:
    """Most parts need no preparation."""


@dataclass(frozen=True)
class Part:
    """One process to run, or with `once` one program to complete before others start."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ready: Callable[[float], bool]
    """Whether it works, given when (seconds since 1970) it was started. Answers within seconds."""
    after: tuple[str, ...] = ()
    """Parts that must work before it starts; they end after it."""
    prepare: Callable[[], None] = _nothing
    deadline: float = 180.0
    """Seconds it may take to start."""
    once: bool = False
    done: Path | None = None
    """With `once`: written when the program has completed; where it is, nothing needs to be done."""
    url: str = ""
    """Where a person finds it."""
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_main_only: bool = False


def all_parts(settings: Settings, secrets: Secrets) -> tuple[Part, ...]:
    """The parts of this deployment, in an order in which they can start.

    Args:
        settings: with its keys filled in.
    """
    postgres = _postgres_of(settings)
    parts = [_postgres(settings, postgres)]
    if not settings.spark_remote:
        parts.append(_spark(settings))
    if not settings.mlflow_uri:
        parts.append(_mlflow(settings, postgres))
    return (*parts, *_airflow(settings, secrets, postgres), _gateway(settings, postgres))


def with_keys_url(settings: Settings) -> Settings:
    """`settings` with the embedded database of API keys, unless they name another."""
    if is_set(settings.keys_url):
        return settings
    return settings.model_copy(update={"keys_url": SecretStr(_postgres_of(settings).url(_KEYS_DATABASE))})


def password_file(home: Path) -> Path:
    """Where a person finds the password of Airflow's user."""
    return home / "airflow" / "password.json"


def _postgres_of(settings: Settings) -> Postgres:
    return Postgres(settings.home / "postgres")


def _postgres(settings: Settings, postgres: Postgres) -> Part:
    return Part(
        name="postgres",
        command=postgres.command(),
        environment=part_environment(settings, threads=1, keys=False),
        ready=lambda started: postgres.answers(),
        prepare=postgres.prepare,
        deadline=60,
        user=postgres.system_user,
        # INT closes sessions and ends in order; TERM would wait until every client has left by itself.
        stop_signal=signal.SIGINT,
        stop_main_only=True,
    )


def _spark(settings: Settings) -> Part:
    command, variables = spark_server.command(settings)
    return Part(
        name="spark",
        command=tuple(command),
        environment=part_environment(settings, threads=settings.threads, keys=False) | variables,
        ready=lambda started: spark_server.ready(settings),
        deadline=300,
        url=settings.spark_url,
    )


def _mlflow(settings: Settings, postgres: Postgres) -> Part:
    artifacts = settings.home / "mlflow" / "artifacts"

    def prepare() -> None:
        artifacts.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(registry_mark(settings.home), {"environment": settings.environment})
        postgres.create_database("mlflow")

    return Part(
        name="mlflow",
        command=(
            sys.executable, "-m", "mlflow", "server",
            "--host", settings.listens_on, "--port", str(settings.mlflow_port), "--workers", "1",
            "--artifacts-destination", str(artifacts),
        ),
        environment=part_environment(settings, threads=1, keys=False)
        | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # An address may hold a password, and everybody on a machine sees its command lines.
            "MLFLOW_BACKEND_STORE_URI": postgres.url("mlflow"),
        },
        ready=lambda started: _get(settings, settings.mlflow_port, "/health") is not None,
        after=("postgres",),
        prepare=prepare,
        url=settings.mlflow_url,
    )  # fmt: skip


def _airflow(settings: Settings, secrets: Secrets, postgres: Postgres) -> tuple[Part, ...]:
    """Airflow's components, each a part: `airflow standalone` runs the same ones, but doesn't notice when one dies,
    and opens two log servers on every address of the machine."""
    home = settings.home / "airflow"

    def environment(*, threads: int, keys: bool) -> dict[str, str]:
        return part_environment(settings, threads=threads, keys=keys) | _airflow_variables(settings, secrets, postgres)

    def command(*arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "airflow", *arguments)

    def prepare() -> None:
        home.mkdir(exist_ok=True, mode=0o700)
        write_json(password_file(settings.home), {ADMIN: secrets.airflow_password})
        postgres.create_database("airflow")

    def healthy(component: str) -> Callable[[float], bool]:
        def answers(started: float) -> bool:
            health = _get(settings, settings.airflow_port, "/api/v2/monitor/health")
            state = health and json.loads(health).get(component)
            if not state or state["status"] != "healthy":
                return False
            # A component that was killed counts as healthy for half a minute: look for a heartbeat of this one.
            beat = state[f"latest_{component}_heartbeat"]
            return bool(beat) and datetime.fromisoformat(beat).timestamp() >= started

        return answers

    return (
        Part(
            name="airflow-database",
            command=command("db", "migrate"),
            environment=environment(threads=1, keys=False),
            ready=lambda started: False,
            after=("postgres",),
            prepare=prepare,
            once=True,
            done=postgres.folder / f"airflow-{version('apache-airflow')}-migrated",
        ),
        Part(
            name="airflow",
            command=command("api-server"),
            environment=environment(threads=1, keys=False),
            ready=lambda started: _get(settings, settings.airflow_port, "/api/v2/monitor/health") is not None,
            after=("airflow-database",),
            url=settings.airflow_url,
        ),
        Part(
            name="airflow-scheduler",
            command=command("scheduler", "--skip-serve-logs"),
            # Tasks run as its children, with its environment.
            environment=environment(threads=settings.threads, keys=True),
            ready=healthy("scheduler"),
            after=("airflow-database",),
        ),
        Part(
            name="airflow-dag-processor",
            command=command("dag-processor"),
            environment=environment(threads=1, keys=False),
            ready=healthy("dag_processor"),
            after=("airflow-database",),
        ),
        Part(
            name="airflow-triggerer",
            command=command("triggerer", "--skip-serve-logs"),
            environment=environment(threads=1, keys=False),
            ready=healthy("triggerer"),
            after=("airflow-database",),
        ),
        Part(
            name="airflow-history",
            command=(sys.executable, "-m", "millrace.stack.history"),
            environment=environment(threads=1, keys=False),
            ready=lambda started: True,
            after=("airflow-database",),
        ),
    )


def _airflow_variables(settings: Settings, secrets: Secrets, postgres: Postgres) -> dict[str, str]:
    home = settings.home / "airflow"
    options: dict[str, dict[str, object]] = {
        "core": {
            "dags_folder": PROJECT / "dags",
            "plugins_folder": PROJECT / "plugins",
            "load_examples": False,
            "executor": "LocalExecutor",
            # One heavy task at a time (the pool), beside it the short ones of the controller and the ingestion.
            "parallelism": max(4, settings.threads),
            # Unpausing is a decision: a weekly fine-tune whose hour has passed is due at that moment.
            "dags_are_paused_at_creation": True,
            "fernet_key": secrets.airflow_fernet_key,
            "simple_auth_manager_users": f"{ADMIN}:admin",
            "simple_auth_manager_all_admins": False,
            "simple_auth_manager_passwords_file": password_file(settings.home),
            "execution_api_server_url": f"{settings.airflow_url}/execution/",
        },
        "database": {"sql_alchemy_conn": postgres.url("airflow")},
        "api": {
            "host": settings.listens_on,
            "port": settings.airflow_port,
            "workers": 1,
            "base_url": settings.airflow_url,
            "secret_key": secrets.airflow_secret_key,
        },
        "api_auth": {"jwt_secret": secrets.airflow_jwt_secret},
        # A new DAG file shows up within seconds.
        "dag_processor": {"refresh_interval": 5, "min_file_process_interval": 30},
        "scheduler": {
            # What ran when the machine or the stack was killed is run again after seconds, not five minutes.
            "orphaned_tasks_check_interval": 20,
            "task_instance_heartbeat_timeout": 120,
        },
        "logging": {"base_log_folder": settings.home / "logs" / "tasks"},
    }
    variables = {"AIRFLOW_HOME": str(home)}
    for section, values in options.items():
        for name, value in values.items():
            variables[f"AIRFLOW__{section}__{name}".upper()] = str(value)
    return variables


def _gateway(settings: Settings, postgres: Postgres) -> Part:
    known = with_keys_url(settings)
    embedded = not is_set(settings.keys_url) or settings.keys_url == SecretStr(postgres.url(_KEYS_DATABASE))
    needs = [name for name, here in (("mlflow", not settings.mlflow_uri), ("postgres", embedded)) if here]
    return Part(
        name="gateway",
        command=(sys.executable, "-m", "millrace.serving"),
        environment=part_environment(known, threads=settings.threads, keys=True),
        ready=lambda started: _get(settings, settings.gateway_port, "/healthz") is not None,
        after=tuple(needs),
        prepare=(lambda: postgres.create_database(_KEYS_DATABASE)) if embedded else _nothing,
        url=settings.gateway_url,
    )


def _get(settings: Settings, port: int, path: str) -> bytes | None:
    """The body of a 200, or None. No proxy is asked."""
    connection = http.client.HTTPConnection(settings.host, port, timeout=3)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
