"""One typed object with every deployment choice, read from the environment once, at the edge.

It knows where things are and who may be asked; it does not know what an application is
(`applications.py`) nor start anything (`stack.py`).
"""

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import Field, SecretStr, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from millrace.errors import SettingsError
from millrace.secret_sources import SecretFile, SecretSources, SecretVariable, is_set, variables_of, without_logins

_PERSON = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

PACKAGE = Path(__file__).parent
PROJECT = PACKAGE.parents[1]


Launcher = Literal["local", "torchrun", "deepspeed", "spark"]
"""What starts the processes of a fine-tune."""
AirflowRole = Literal["viewer", "operator", "admin"]
AIRFLOW_SERVICE = "millrace"
"""As whom the stack itself asks its Airflow."""
AIRFLOW_ADMIN = "admin"
"""The user of an Airflow that only this machine reaches."""
NOBODY = frozenset({AIRFLOW_SERVICE, AIRFLOW_ADMIN, "anonymous"})
"""Names that no person has: where others reach an Airflow, no decision of theirs counts."""


class Settings(BaseSettings):
    """Read from `MILLRACE_<FIELD>`; a secret also from the file that `MILLRACE_<FIELD>_FILE` names, or from Airflow's
    Variable that `MILLRACE_<FIELD>_VARIABLE` names (docs/secrets.md). Ask a secret for its value where it is used: then
    a rotated one counts. Construct with `read_settings()`, which turns mistakes into one sentence."""

    model_config = SettingsConfigDict(env_prefix="MILLRACE_", frozen=True)

    home: Path = Path(".millrace")
    """Everything that this deployment keeps: lake, index builds, logs, database."""
    cache: Path = Path("~/.cache/millrace")
    """What can be downloaded or converted again: Spark's jars, converted models. Shared between homes."""
    environment: Literal["dev", "staging", "prod"] = "dev"
    pace: Literal["standard", "demo"] = "standard"
    """`demo` applies `[pace.demo]` of each application's declaration: shorter waits, larger first shares."""
    applications: Path = PACKAGE.parent / "applications"
    """Folder with one declaration (`<name>.toml`) per application."""
    commit: str = Field("", pattern=r"^([0-9a-f]{40}(-changed)?)?$")
    """Git commit of the running code, where it is no checkout that could say so, as in an image; empty: ask git."""

    host: str = "127.0.0.1"
    """Address by which this deployment's servers are reached."""
    bind: str = ""
    """Address that they listen on, where that is another; empty: `host`. In a container: `0.0.0.0`."""
    airflow_port: int = Field(8080, ge=1, le=65535)
    mlflow_port: int = Field(5000, ge=1, le=65535)
    gateway_port: int = Field(8000, ge=1, le=65535)
    spark_port: int = Field(15002, ge=1, le=65535)
    mlflow_uri: str = ""
    """An MLflow server elsewhere; empty: the embedded one."""
    mlflow_workspaces: bool = False
    """That server is several environments', each in an MLflow workspace of its name; else it is this one's alone."""
    spark_remote: str = ""
    """A Spark Connect server elsewhere (`sc://host:port`); empty: the embedded one."""
    spark_token: SecretStr = SecretStr("")
    """What callers of the Spark Connect server show it: letters, digits, `-`, `.`, `_` and `~`; empty: whoever reaches
    it may run code there. It travels as the connection does, so over more than one machine use TLS
    (`sc://host:port/;use_ssl=true;token=…`) instead."""
    spark_master: str = Field("", pattern=r"^(spark://\S+)?$")
    """A Spark standalone cluster elsewhere (`spark://host:7077`) on which the embedded Connect server runs its tasks;
    empty: its own threads, or `spark_workers`. Its nodes need the lake, and this package at the same path."""
    spark_workers: int = Field(0, ge=0)
    """Workers of a Spark standalone cluster that the stack starts on this machine; 0: none."""
    spark_master_port: int = Field(7077, ge=1, le=65535)
    spark_ui_port: int = Field(8180, ge=1, le=65000)
    """The page of that cluster's master; its workers have the ports after it."""
    spark_executor_cores: int = Field(1, ge=1)
    """Tasks that one executor runs at once; a worker of `spark_workers` runs one executor."""
    spark_executor_memory_mb: int = Field(1024, ge=512)
    """Heap of one executor. Its Python processes come on top."""
    spark_secret: SecretStr = SecretStr("")
    """What the processes of the Spark cluster show one another (`spark.authenticate.secret`); empty: one of this home's
    for `spark_workers`, none for `spark_master`."""
    qdrant_url: str = Field("", pattern=r"^(https?://\S+)?$")
    """A Qdrant server for index builds (`https://host:port`); empty: they are folders, searched in-process."""
    qdrant_api_key: SecretStr = SecretStr("")
    """Its API key, or a JWT; empty: it asks for none."""

    postgres_url: str = Field("", pattern=r"^(postgresql://[^\s:@/]+@\S*/\S+)?$")
    """The PostgreSQL server that several environments share, for `millrace access` alone, as its superuser reaches it
    (`postgresql://postgres@host:5432/postgres`, without a password); empty: each environment has its own."""
    access_secrets: SecretStr = SecretStr("")
    """For `millrace access` alone: a JSON object, wall → who → password or key; docs/access.md shows it."""

    upstream_url: str = Field("", pattern=r"^(https?://\S+)?$")
    """An OpenAI-compatible server (`http://host:port/v1`), such as vLLM, for releases whose model a server has."""
    upstream_api_key: SecretStr = SecretStr("")
    """Its key; empty: it asks for none."""
    upstream_model: str = ""
    """What that server calls the model that new releases generate with; empty: the weights of the declared package, in
    this process. Releases that exist keep theirs: to change is to let a candidate through the gate."""

    lake_uri: str = Field("", pattern=r"^(s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/[\w.=-]+)*)?$")
    """Root of the Lakehouse in an S3-compatible object store (`s3://bucket/prefix`); empty: a folder of `home`."""
    lake_endpoint: str = Field("", pattern=r"^(https?://[^\s/]+)?$")
    """That store (`https://host:port`); empty: AWS's own."""
    lake_region: str = Field("us-east-1", min_length=1)
    lake_access_key: SecretStr = SecretStr("")
    """This environment's credential there; empty: what this machine has of AWS, by its own chain."""
    lake_secret_key: SecretStr = SecretStr("")
    object_store_port: int = Field(0, ge=0, le=65535)
    """Of an S3 server that the stack starts on this machine and keeps in `home`, with a credential for each
    environment; 0: none. `lake_uri` then says where in it the lake is, and no other setting is needed."""
    spark_tables: frozenset[str] = frozenset({"silver/chunks", "gold/answers"})
    """Tables that Spark commits to in this deployment, as a JSON list; delta-rs commits to all others."""
    batch_workers: int = Field(1, ge=1)
    """Spark tasks that answer a table of questions at once, each with a generator of its own in memory."""
    batch_slice: int = Field(200, ge=1)
    """Questions between commits of their answers: what a killed run has to ask again."""

    training_launcher: Launcher = "local"
    """`local`, `torchrun` and `deepspeed` start a fine-tune's processes on this machine, `spark` as tasks of the Spark
    Connect server, which needs `home` in reach of its workers; docs/training.md says more."""

    answer_cache: bool = True
    """Answer an identical request to the same release and index build from memory; not while releases are compared."""
    engine_cache_gb: int = Field(1, ge=1)
    """Key-value cache of each loaded generator, in GiB."""
    gateways: int = Field(1, ge=1, le=64)
    """Gateway processes that the stack starts, on `gateway_port` and the ports after it; they share keys, budgets and
    split, and each takes feedback on the answers of all."""
    gateway_workers: int = Field(16, ge=1)
    """Exchanges that one gateway works on at once; its engines compute them together."""
    gateway_queue: int = Field(64, ge=0)
    """Exchanges that may wait for a worker; beyond that a caller is told to come back (429)."""
    gateway_keys: Literal["", "required", "off"] = ""
    """Whether callers of the gateway need an API key; empty: wherever others could reach it (`keys_required`)."""
    keys_url: SecretStr = SecretStr("")
    """Where API keys are kept (`postgresql://user:password@host/database`); empty: the embedded PostgreSQL."""
    api_key: SecretStr = SecretStr("")
    """What `millrace ask` and simulated users show a gateway that requires one."""
    trace_exchanges: bool = False
    """In dev, send exchanges to MLflow as traces, question and answer in them (experiment `<application>/traces`), at
    most ten a second. Elsewhere nothing is traced: `silver/exchanges` holds the same, of every exchange."""
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Threads that one part of the stack may compute with."""

    alert_urls: SecretStr = SecretStr("")
    """Where alerts go: addresses of apprise (`slack://…`, `mailto://…`, `jsons://host/path` for a webhook), separated
    by white space; empty: alerts are only logged."""
    alert_repeat_hours: float = Field(6, gt=0)
    """An alert that goes on is sent again after this long; until then it is only counted."""

    airflow_users: Annotated[dict[str, AirflowRole], NoDecode] = Field(default_factory=dict)
    """Who logs in to Airflow, as a JSON object of names and roles: a `viewer` reads, an `operator` also triggers,
    clears and approves, an `admin` may everything. Where only this machine reaches Airflow, in dev, there is `admin`
    besides; elsewhere nobody but these and the stack itself."""
    airflow_passwords: SecretStr = SecretStr("")
    """Their passwords, as a JSON object, of at least 12 characters; who has none here gets one at the first start, in
    `<home>/airflow/password.json`."""
    airflow_history_days: float = Field(90, gt=0)
    """Days after which runs, task instances and the audit log leave Airflow's database; a DAG's latest run stays."""

    backup_airflow_url: SecretStr = SecretStr("")
    """For `millrace backup` and `restore` alone: where Airflow's database is (`postgresql://user:password@host/database`);
    empty: in the embedded PostgreSQL. The gateway's is `keys_url`."""
    backup_mlflow_url: SecretStr = SecretStr("")
    """The same for MLflow's."""
    backup_artifacts: str = ""
    """For the same: where an MLflow server elsewhere keeps its artifacts (`s3://bucket?region=…`, as Arrow writes
    addresses, or `file:///…`); empty: the embedded one's folder."""

    completion_key: SecretStr = SecretStr("")
    """Signs completion ids. One key a line, the newest first: it signs, and all verify (`sources/completion_id.py`)."""
    pseudonym_key: SecretStr = SecretStr("")
    """Turns users into pseudonyms before anything is stored. With another one every user is a stranger."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, SecretSources(settings_cls), env_settings

    @field_validator("*", mode="wrap")
    @classmethod
    def _a_secret_that_is_read_at_its_use_stays_one(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return value if isinstance(value, SecretFile | SecretVariable) else handler(value)

    @model_validator(mode="after")
    def _a_model_has_a_server(self) -> Self:
        if self.upstream_model and not self.upstream_url:
            raise ValueError("MILLRACE_UPSTREAM_MODEL needs MILLRACE_UPSTREAM_URL, the server that has the model")
        return self

    @model_validator(mode="after")
    def _one_spark(self) -> Self:
        if len(said := [name for name in ("spark_remote", "spark_master", "spark_workers") if getattr(self, name)]) > 1:
            raise ValueError(
                f"{' and '.join(f'MILLRACE_{name.upper()}' for name in said)} say where Spark runs, each in another "
                "way; set one of them"
            )
        return self

    @model_validator(mode="after")
    def _only_this_machine_asks_without_a_key(self) -> Self:
        if self.gateway_keys == "off" and self.reached_by_others:
            raise ValueError(
                f"MILLRACE_GATEWAY_KEYS=off would let anybody ask: it is for dev on 127.0.0.1 only, and this is "
                f"{self.environment} on {self.listens_on}; leave it empty, and make keys with `millrace key create`"
            )
        return self

    @field_validator("airflow_users", mode="before")
    @classmethod
    def _read_people(cls, written: Any) -> Any:
        """A compose file gives an empty text for nobody, which is no JSON."""
        if not isinstance(written, str):
            return written
        try:
            return json.loads(written or "{}")
        except ValueError:
            raise ValueError('no JSON object such as {"ann": "operator"}') from None

    @model_validator(mode="after")
    def _people_have_names(self) -> Self:
        for name in self.airflow_users:
            if name.lower() in NOBODY or not _PERSON.fullmatch(name):
                raise ValueError(
                    f"MILLRACE_AIRFLOW_USERS: {name!r} names no person; use a name of letters, digits, . _ and -, "
                    f"other than {', '.join(sorted(NOBODY))}"
                )
        return self

    @model_validator(mode="after")
    def _workspaces_have_a_server(self) -> Self:
        if self.mlflow_workspaces and not self.mlflow_uri:
            raise ValueError(
                "MILLRACE_MLFLOW_WORKSPACES needs MILLRACE_MLFLOW_URI, the server that the environments share"
            )
        return self

    @model_validator(mode="after")
    def _a_lake_elsewhere_is_reached_whole(self) -> Self:
        if is_set(self.lake_access_key) != is_set(self.lake_secret_key):
            raise ValueError("MILLRACE_LAKE_ACCESS_KEY and MILLRACE_LAKE_SECRET_KEY are one credential: set both")
        if self.lake_endpoint and not self.lake_uri:
            raise ValueError("MILLRACE_LAKE_ENDPOINT needs MILLRACE_LAKE_URI, the lake's bucket there")
        if self.object_store_port and (not self.lake_uri or self.lake_endpoint):
            raise ValueError(
                "MILLRACE_OBJECT_STORE_PORT starts a store here for the lake in MILLRACE_LAKE_URI: set that, and "
                "no MILLRACE_LAKE_ENDPOINT, which is a store elsewhere"
            )
        return self

    @model_validator(mode="after")
    def _absolute_paths(self) -> Self:
        for name in ("home", "cache", "applications"):
            object.__setattr__(self, name, Path(getattr(self, name)).expanduser().absolute())
        return self

    @property
    def lake(self) -> str:
        """Root of the Lakehouse; tables are at `<lake>/<environment>/<application>/<layer>/<table>`."""
        return self.lake_uri or str(self.home / "lake")

    @property
    def listens_on(self) -> str:
        return self.bind or self.host

    @property
    def keys_required(self) -> bool:
        """Whether the gateway answers only to an API key: in staging, in prod, where it listens beyond this machine,
        and wherever `gateway_keys` says so."""
        return self.gateway_keys == "required" or self.reached_by_others

    @property
    def reached_by_others(self) -> bool:
        """Whether this is more than dev on this machine."""
        return self.environment != "dev" or not _is_loopback(self.listens_on)

    @property
    def mlflow_url(self) -> str:
        return self.mlflow_uri or f"http://{self.host}:{self.mlflow_port}"

    @property
    def mlflow_workspace(self) -> str | None:
        """The MLflow workspace with this environment's models, prompts and experiments; None: the server has none."""
        return self.environment if self.mlflow_workspaces else None

    @property
    def airflow_url(self) -> str:
        return f"http://{self.host}:{self.airflow_port}"

    @property
    def gateway_url(self) -> str:
        return f"http://{self.host}:{self.gateway_port}"

    @property
    def gateway_ports(self) -> range:
        """Of the stack's gateways, which are equals."""
        return range(self.gateway_port, self.gateway_port + self.gateways)

    @property
    def gateway_urls(self) -> tuple[str, ...]:
        return tuple(f"http://{self.host}:{port}" for port in self.gateway_ports)

    @property
    def spark_cluster(self) -> str:
        """Address of the standalone cluster that the embedded Connect server runs its tasks on; empty: on none."""
        return self.spark_master or (f"spark://{self.host}:{self.spark_master_port}" if self.spark_workers else "")

    @property
    def spark_url(self) -> str:
        return self.spark_remote or f"sc://{self.host}:{self.spark_port}"

    @property
    def spark_bearer(self) -> str:
        """`spark_token` in the clear.

        Raises:
            SettingsError: PySpark's server couldn't hand it to a stream, which it does in an address, as it is.
        """
        token = self.spark_token.get_secret_value()
        if quote(token, safe="") != token:
            raise SettingsError(
                "MILLRACE_SPARK_TOKEN may hold letters, digits, -, ., _ and ~ only; start Spark Connect's server with "
                "another one (python -c 'import secrets; print(secrets.token_urlsafe(32))')"
            )
        return token

    @property
    def spark_connection(self) -> str:
        """`spark_url` with the token, for the client only: it is not to be printed. Raises as `spark_bearer`."""
        token = self.spark_bearer
        if not token:
            return self.spark_url
        # As a header of its own: PySpark sends what it knows as a token over TLS only.
        joint = ";" if "/;" in self.spark_url else "/;"
        return f"{self.spark_url}{joint}authorization={quote(f'Bearer {token}', safe='')}"

    def event_log(self, application: str) -> Path:
        """Folder of the gateway's event segments for one application."""
        return self.home / "events" / self.environment / application

    def index_builds(self, application: str) -> Path:
        """Folder of one application's index builds, a folder per retrieval lineage."""
        return self.home / "indexes" / self.environment / application


def read_settings() -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: a value is invalid, or a `MILLRACE_` variable is unknown (it would be ignored silently).
    """
    known = {f"MILLRACE_{name}".upper() for name in Settings.model_fields}
    sources = variables_of(Settings)
    unknown = sorted(name for name in os.environ if name.startswith("MILLRACE_") and name not in known | sources)
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError(f"invalid settings: {'; '.join(_problem(one) for one in error.errors())}") from None


def _problem(error: Any) -> str:
    """One of pydantic's errors in a sentence, without a value that may be secret."""
    if not error["loc"]:  # of several settings together: its input is all of them
        return str(error["msg"]).removeprefix("Value error, ")
    name = "_".join(str(part) for part in error["loc"])
    secret = Settings.model_fields[str(error["loc"][0])].annotation is SecretStr
    got = "" if secret else f" (got {without_logins(repr(error['input']))})"
    return f"MILLRACE_{name.upper()}: {error['msg']}{got}"


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
