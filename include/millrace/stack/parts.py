"""Every part of the stack as a value: its command, its environment, what it needs first, how to ask whether it works.

Building a part starts nothing. What differs between two deployments comes from the settings and the secrets.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.metadata import version

from pydantic import SecretStr

from millrace.environments.access import airflow_wall
from millrace.private_files import write_json
from millrace.secret_sources import is_set
from millrace.settings import AIRFLOW_ADMIN, AIRFLOW_SERVICE, PROJECT, Settings
from millrace.stack.environment import part_environment
from millrace.stack.home import Secrets, registry_mark
from millrace.stack.object_store import WALLED, object_store_parts
from millrace.stack.part import Part, get, nothing
from millrace.stack.postgres import Postgres
from millrace.stack.spark_parts import spark_parts

_KEYS_DATABASE = "gateway"


def all_parts(settings: Settings, secrets: Secrets) -> tuple[Part, ...]:
    """The parts of this deployment, in an order in which they can start.

    Args:
        settings: with its keys filled in.
    """
    postgres = _postgres_of(settings)
    store = object_store_parts(settings) if settings.object_store_port else []
    parts = [postgres_part(settings)]
    if not settings.spark_remote:
        parts += spark_parts(settings, secrets)
    if not settings.mlflow_uri:
        parts.append(_mlflow(settings, postgres))
    parts += [*_airflow(settings, secrets, postgres), *_gateways(settings, postgres)]
    return (*store, *(_with_its_lake(part) if store else part for part in parts))


def _with_its_lake(part: Part) -> Part:
    uses = part.name in ("spark", "airflow-database", "airflow-scheduler") or part.name.startswith("gateway")
    return replace(part, after=(*part.after, WALLED)) if uses else part


def with_keys_url(settings: Settings) -> Settings:
    """`settings` with the embedded database of API keys, unless they name another."""
    if is_set(settings.keys_url):
        return settings
    return settings.model_copy(update={"keys_url": SecretStr(_postgres_of(settings).url(_KEYS_DATABASE))})


def _postgres_of(settings: Settings) -> Postgres:
    return Postgres(settings.home / "postgres")


def postgres_part(settings: Settings) -> Part:
    postgres = _postgres_of(settings)
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
        ready=lambda started: get(settings, settings.mlflow_port, "/health") is not None,
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
        own = {AIRFLOW_ADMIN: secrets.airflow_password, AIRFLOW_SERVICE: secrets.airflow_service_password}
        airflow_wall.tell(settings, airflow_wall.plan(settings, own), actor="service/stack")
        airflow_wall.apply(settings, own)
        postgres.create_database("airflow")

    def healthy(component: str) -> Callable[[float], bool]:
        def answers(started: float) -> bool:
            health = get(settings, settings.airflow_port, "/api/v2/monitor/health")
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
            ready=lambda started: get(settings, settings.airflow_port, "/api/v2/monitor/health") is not None,
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
            "simple_auth_manager_all_admins": False,
            "simple_auth_manager_passwords_file": airflow_wall.password_file(settings.home),
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
        # In the part's log, which is bounded, and not in a file for each DAG file and day.
        "logging": {"base_log_folder": settings.home / "logs" / "tasks", "dag_processor_log_target": "stdout"},
    }
    variables = {"AIRFLOW_HOME": str(home)}
    for section, values in options.items():
        for name, value in values.items():
            variables[f"AIRFLOW__{section}__{name}".upper()] = str(value)
    return variables


def _gateways(settings: Settings, postgres: Postgres) -> Iterator[Part]:
    known = with_keys_url(settings)
    embedded = not is_set(settings.keys_url) or settings.keys_url == SecretStr(postgres.url(_KEYS_DATABASE))
    needs = [name for name, here in (("mlflow", not settings.mlflow_uri), ("postgres", embedded)) if here]
    for number, port in enumerate(settings.gateway_ports, 1):
        own = known.model_copy(update={"gateway_port": port})
        yield Part(
            name="gateway" if number == 1 else f"gateway-{number}",
            command=(sys.executable, "-m", "millrace.serving"),
            environment=part_environment(own, threads=settings.threads, keys=True),
            ready=partial(_serves, own),
            after=tuple(needs),
            prepare=(lambda: postgres.create_database(_KEYS_DATABASE)) if embedded else nothing,
            url=own.gateway_url,
        )


def _serves(settings: Settings, started: float) -> bool:
    return get(settings, settings.gateway_port, "/healthz") is not None
