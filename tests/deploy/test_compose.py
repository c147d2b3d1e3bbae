"""No container engine was at hand: so `docker-compose.yaml` and the `Dockerfile` are held against everything that can
be asked without one. Each check is shown to fail by a file that is wrong in one place."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import millrace
from millrace.environments.audit import search
from millrace.serving.metrics import Metrics
from millrace.settings import PROJECT, Settings
from tests.deploy import checks
from tests.deploy.reading import IMAGE, Compose, Unset

TEXT = (PROJECT / "docker-compose.yaml").read_text()
FOLDER = PROJECT / "deploy" / "compose"
EXAMPLE = FOLDER / ".env.example"
SEE = "see deploy/compose/.env.example"
CHECKS = (
    checks.settings,
    checks.as_embedded,
    checks.airflow_options,
    checks.commands,
    checks.addresses,
    checks.exposure,
    checks.lifecycle,
    checks.files,
)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """What the command in `.env.example` writes, as a container engine reads it."""
    made = subprocess.run(
        [sys.executable, str(FOLDER / "new_env.py"), str(EXAMPLE)], capture_output=True, text=True, check=True
    )
    return dict(line.split("=", 1) for line in made.stdout.splitlines() if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def compose(environment: dict[str, str]) -> Compose:
    return Compose.read(TEXT, environment)


@pytest.mark.slow
def test_it_is_a_compose_file_by_the_specifications_schema(tmp_path: Path) -> None:
    assert not refused_by_the_schema(PROJECT / "docker-compose.yaml")
    wrong = tmp_path / "docker-compose.yaml"
    wrong.write_text(TEXT.replace("stop_grace_period:", "stop_grace_time:"))
    assert "stop_grace_time" in refused_by_the_schema(wrong)


def refused_by_the_schema(file: Path) -> str:
    """What the schema that check-jsonschema carries (of compose-spec, Apache-2.0) says against a file."""
    checker = [str(checks.BINARIES / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file)]
    said = subprocess.run(checker, capture_output=True, text=True)
    return said.stdout + said.stderr if said.returncode else ""


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_file_and_the_code_agree(check, compose: Compose) -> None:
    assert list(check(compose)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "right", "wrong", "said"),
    [
        (checks.settings, "MILLRACE_QDRANT_URL:", "MILLRACE_QDRANT_ADDRESS:", "unknown setting"),
        (checks.settings, "THREADS: ${THREADS:-2}", "THREADS: ${THREADS:-two}", "MILLRACE_THREADS"),
        (checks.settings, "MILLRACE_SPARK_REMOTE: sc://spark:15002", "X: y", "embedded part"),
        (checks.settings, "  MILLRACE_ALERT_URLS: ${ALERT_URLS:-}\n", "", "MILLRACE_ALERT_URLS"),
        (checks.settings, "1gb\n    secrets: *key-files\n", "1gb\n", "_KEY_FILE: /run/secrets/"),
        (checks.settings, "pseudonym_key, uid: \"10001\", gid: \"10001\", mode: 0400", "pseudonym_key", "may read"),
        (checks.as_embedded, '"triggerer", "--skip-', '"triggerer"]\n    secrets: *key-files\n    x: ["', "isn't told"),
        (checks.settings, "MILLRACE_BIND: 0.0.0.0", "MILLRACE_BIND: 127.0.0.1", "listens where no other"),
        (checks.settings, "GATEWAY_KEYS: required", 'GATEWAY_KEYS: "off"', "would let anybody ask"),
        (checks.as_embedded, 'HEARTBEAT_TIMEOUT: "120"', 'HEARTBEAT_TIMEOUT: "300"', "the embedded stack 120"),
        (checks.as_embedded, '  SPT_NOENV: "1"\n', "", "SPT_NOENV=None"),
        (checks.as_embedded, "[*settings, *one-thread,", "[*settings, *keys, *one-thread,", "isn't told"),
        (checks.as_embedded, '"scheduler", "--skip-serve-logs"', '"scheduler"', "airflow-scheduler runs"),
        (checks.as_embedded, "      - --workers=1\n", "", "mlflow has no --workers"),
        (checks.airflow_options, "AIRFLOW__CORE__PARALLELISM", "AIRFLOW__CORE__PARALELLISM", "PARALELLISM"),
        (checks.commands, 'millrace.serving"]', 'millrace.gateway"]', "millrace.gateway runs nothing"),
        (checks.commands, 'lakehouse.spark_server"]', 'lakehouse.lake"]', "lakehouse.lake runs nothing"),
        (checks.commands, '"triggerer", "--skip-serve-logs"', '"triggers"', "airflow-triggerer: airflow triggers: "),
        (checks.commands, "--artifacts-destination", "--artifact-destination", "--artifact-destination"),
        (checks.commands, "MLFLOW_BACKEND_STORE_URI", "MLFLOW_BACKEND_URI", "MLFLOW_BACKEND_URI"),
        (checks.commands, "--allowed-hosts=mlflow:5000,", "--allowed-hosts=", "asks as mlflow:5000 is refused"),
        (checks.addresses, "sc://spark:15002", "sc://spark:15003", "asks spark at 15003"),
        (checks.addresses, "@postgres/mlflow", "@database/mlflow", "database, which is no service"),
        (checks.addresses, "SERVICE__API_KEY: ${QDRANT", "SERVICE__API_KEY: ${VLLM", "differ"),
        (checks.addresses, "override=object-store:7070", "override=objects:7070", "objects, which is no service"),
        (checks.addresses, "127.0.0.1:8000/healthz", "127.0.0.1:8080/healthz", "gateway: its health check asks"),
        (checks.exposure, "127.0.0.1:${GATEWAY_P", "${GATEWAY_P", "gateway publishes"),
        (checks.exposure, "qdrant/qdrant:v1.20.0", "qdrant/qdrant:latest", "names no version"),
        (checks.exposure, f"{{QDRANT_API_KEY:?{SEE}}}", "{QDRANT_API_KEY:-s3cret}", "in the file"),
        (checks.exposure, f"${{POSTGRES_PASSWORD:?{SEE}}}", "postgres", "in the file"),
        (checks.exposure, "        limits: {memory: 8g}", '        limits: {cpus: "2"}', "may take all memory"),
        (checks.lifecycle, "      spark: {condition", "      sparks: {condition", "sparks, which is no service"),
        (checks.lifecycle, "  prometheus: {condition", "  gateway: {condition", "profile doesn't start"),
        (checks.lifecycle, "spark: {condition: service_healthy}", "spark: {condition: service_started}", "started"),
        (checks.lifecycle, '      test: ["CMD", "pg_isready"', '      text: ["CMD", "pg_isready"', "no health check"),
        (checks.files, "compose/prometheus.yaml:/etc", "compose/prometheus.yml:/etc", "isn't there"),
        (checks.files, "  models:\n  prometheus:", "  prometheus:", "models is not declared"),
        (checks.files, "      - home:/var/lib/millrace\n", "", "would lose its home"),
    ],
)  # fmt: skip
def test_each_check_notices_what_is_wrong(
    check, right: str, wrong: str, said: str, environment: dict[str, str]
) -> None:
    assert right in TEXT
    assert said in "\n".join(check(Compose.read(TEXT.replace(right, wrong), environment)))


def test_each_profile_starts_what_it_says(compose: Compose) -> None:
    core = {
        "postgres", "object-store-bucket", "object-store", "mlflow", "qdrant", "spark", "airflow-init",
        "airflow-api-server", "airflow-scheduler", "airflow-dag-processor", "airflow-triggerer", "airflow-history",
        "gateway",
    }  # fmt: skip
    assert compose.started() == set()
    assert compose.started("core") == core
    assert compose.started("gpu") == {"vllm"}
    assert compose.started("backup") == {"backup"}
    assert compose.started("spark-cluster") == {"spark-master", "spark-worker-1", "spark-worker-2"}
    assert compose.started("celery") == {"redis", "airflow-worker", "airflow-worker-heavy"}
    assert compose.started("gateways") == {"gateway-2", "gateways"}
    assert compose.started("observability") == {"prometheus", "grafana", "otel-collector"}
    reserved = compose.services["vllm"].definition["deploy"]["resources"]["reservations"]["devices"]
    assert [(device["driver"], device["capabilities"]) for device in reserved] == [("nvidia", ["gpu"])]


@pytest.mark.slow
def test_every_secret_is_asked_for_by_name_and_the_example_names_every_variable(environment: dict[str, str]) -> None:
    asked = Compose.read(TEXT, environment).variables()
    needed = {name for name, insists in asked.items() if insists}
    assert needed == set(environment)
    assert len(set(environment.values())) == len(environment)
    for name in sorted(needed):
        with pytest.raises(Unset, match=f"{name}: (see deploy/compose/.env.example|required by secret)"):
            Compose.read(TEXT, {other: value for other, value in environment.items() if other != name})
    example = EXAMPLE.read_text()
    assert all(re.search(rf"^#.*\b{name}\b", example, re.MULTILINE) for name in set(asked) - needed)
    assert all(line.startswith("#") or line.endswith("=") for line in example.splitlines() if line)
    # The same file feeds `make run` of whoever exports it: no name in it may be a setting that isn't known.
    assert not [name for name in asked if name.startswith("MILLRACE_")]


def test_the_secrets_are_what_their_readers_take(environment: dict[str, str]) -> None:
    from cryptography.fernet import Fernet

    Fernet(environment["AIRFLOW_FERNET_KEY"])
    assert len(environment["AIRFLOW_JWT_SECRET"]) >= 64
    assert all(re.fullmatch(r"[\w=-]{40,}", value) for value in environment.values())


def test_images_are_of_the_versions_that_the_lock_has(compose: Compose) -> None:
    lock = dict(re.findall(r"^([\w-]+)==([\w.]+)", (PROJECT / "requirements.txt").read_text(), re.MULTILINE))
    images = {name: one.definition["image"] for name, one in compose.services.items()}
    assert images["mlflow"] == f"ghcr.io/mlflow/mlflow:v{lock['mlflow']}-full"
    assert images["qdrant"].split(":v")[1].split(".")[:2] == lock["qdrant-client"].split(".")[:2]
    version = re.search(r'^version = "(.+)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert {one.definition["image"] for one in compose.ours} == {f"millrace:{version[1]}"}


@pytest.mark.slow
def test_the_first_start_makes_the_home_the_password_and_the_pool_and_a_later_one_only_brings_the_home_up_to_date(
    compose: Compose, tmp_path: Path
) -> None:
    """The script itself, with a program in Airflow's place that writes down its calls (which Airflow's parser takes:
    see `commands`)."""
    service = compose.services["airflow-init"]
    calls, programs, home = tmp_path / "calls", tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    for name, program in {
        "python": f'exec {sys.executable} "$@"',
        "airflow": f'echo "$*" >> {calls}\ntest "$1 $2" != "pools get" || test -e {tmp_path}/pool',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{program}\n")
        (programs / name).chmod(0o755)
    given = service.environment | {"MILLRACE_HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}"}
    given |= {"MILLRACE_AIRFLOW_USERS": '{"ann": "operator"}', "AIRFLOW_PASSWORDS": '{"ann": "the password of ann"}'}
    script = FOLDER / "airflow-init.sh"
    for _ in range(2):
        subprocess.run(["sh", str(script)], env=given, check=True)
        assert json.loads((home / "format.json").read_text()) == {"format": millrace.FORMAT_VERSION}
        (home / "format.json").write_text('{"format": 1}')
        (tmp_path / "pool").touch()
    passwords = json.loads((home / "airflow" / "password.json").read_text())
    assert passwords.keys() == {"millrace", "ann"}
    assert passwords["ann"] == "the password of ann"
    assert "millrace:op,ann:user" in (home / "airflow" / "airflow.cfg").read_text()
    told = search(Settings(home=home), actor="service/compose")
    assert {(one["resource"], one["outcome"]) for one in told} >= {("airflow/ann", "add")}
    assert (home / "airflow" / "password.json").stat().st_mode & 0o077 == 0
    newer = '{"format": 1000}'
    (home / "format.json").write_text(newer)
    refused = subprocess.run(["sh", str(script)], env=given, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "written by a newer Millrace" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (home / "format.json").read_text() == newer
    assert [call.split()[:3] for call in calls.read_text().splitlines()] == [
        ["db", "migrate"], ["pools", "get", "heavy"], ["pools", "set", "heavy"], ["db", "migrate"],
        ["pools", "get", "heavy"],
    ]  # fmt: skip


@pytest.mark.slow
def test_a_health_check_tells_a_server_that_works_from_one_that_does_not(compose: Compose) -> None:
    """Each that is a program of Python, run against a server that says one and then the other."""
    beats = {"scheduler", "dag_processor", "triggerer"}
    assert beats <= known_components()
    probes = {name: one.probe for name, one in compose.services.items() if one.probe[:1] == ["python"]}
    programs = {name: probe for name, probe in probes.items() if probe[1] == "-c"}
    assert {probe[3] for probe in programs.values() if len(probe) > 3} == beats
    assert len(programs) == 7
    with Answering() as server:
        for service, (_, flag, program, *arguments) in programs.items():
            here = re.sub(r"http://[\w.-]+:\d+", f"http://127.0.0.1:{server.server_port}", program)
            command = [sys.executable, flag, here, *arguments]
            said = []
            for status, state in ((200, "healthy"), (503, "healthy"), (200, "unhealthy")):
                server.answer = status, json.dumps({name: {"status": state} for name in beats}).encode()
                said.append(subprocess.run(command, stderr=subprocess.DEVNULL).returncode)
            assert said == [0, 1, 1 if arguments else 0], service


def known_components() -> set[str]:
    """Whose health Airflow's API tells."""
    model = checks.airflow_package() / "api_fastapi" / "core_api" / "datamodels" / "monitor.py"
    return set(re.findall(r"^    (\w+): \w+InfoResponse", model.read_text(), re.MULTILINE))


class Answering(ThreadingHTTPServer):
    """Answers every request with `answer`, a status and a body."""

    def __init__(self) -> None:
        self.answer = 200, b""
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_prometheus_asks_services_that_answer_and_the_dashboard_shows_metrics_that_exist(compose: Compose) -> None:
    asked = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in asked}
    gateways = {name: checks.settings_of(compose.services[name]).gateway_port for name in ("gateway", "gateway-2")}
    assert targets["gateway"] == [f"{name}:{port}" for name, port in gateways.items()]
    assert {target.split(":")[0] for found in targets.values() for target in found} <= set(compose.services)
    collector = yaml.safe_load((FOLDER / "otel-collector.yaml").read_text())
    listens = {collector["exporters"]["prometheus"]["endpoint"].split(":")[1]}
    for reader in collector["service"]["telemetry"]["metrics"]["readers"]:
        listens.add(str(reader["pull"]["exporter"]["prometheus"]["port"]))
    assert {t.split(":")[1] for found in targets.values() for t in found if t.startswith("otel")} == listens
    sends = compose.services["airflow-scheduler"].environment["OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"]
    receives = collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert f":{receives.split(':')[1]}/v1/metrics" in sends
    names = [metric.name for metric in Metrics().registry.collect()]
    known = {f"{name}{suffix}" for name in names for suffix in ("", "_total", "_bucket")}
    panels = json.loads((FOLDER / "grafana" / "dashboards" / "gateway.json").read_text())["panels"]
    shown = {name for panel in panels for one in panel["targets"] for name in re.findall(r"millrace_\w+", one["expr"])}
    assert len(shown) >= 6
    assert shown <= known


def test_the_gateway_has_the_paths_that_are_asked(settings, compose: Compose) -> None:
    from millrace.serving.gateway import create_app

    paths = {route.path for route in create_app(settings, {}).routes}
    assert {"/healthz", "/metrics"} <= paths
    assert any("/healthz" in argument for argument in compose.services["gateway"].probe)


def test_the_proxy_is_healthy_by_itself_before_any_gateway_is_ready(compose: Compose) -> None:
    (answered,) = re.findall(r"^\trespond (\S+) 200$", (FOLDER / "Caddyfile").read_text(), re.MULTILINE)
    assert compose.services["gateways"].probe[-1] == f"http://127.0.0.1:8080{answered}"


def test_the_image_is_made_of_what_is_there_and_runs_as_a_user_without_rights() -> None:
    lines = re.sub(r"\\\n", " ", (PROJECT / "Dockerfile").read_text()).splitlines()
    steps = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    copied = [shlex.split(rest) for step, rest in steps if step == "COPY"]
    let_in = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for *sources, target in copied:
        for source in sources:
            assert (PROJECT / source).exists()
            assert source in let_in
            assert target in ("./", f"./{source}")
    assert {source for *sources, _ in copied for source in sources} == let_in
    assert (PROJECT / ".dockerignore").read_text().splitlines()[1] == "*"
    assert dict(steps)["WORKDIR"] == IMAGE
    assert re.fullmatch(r"python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", dict(steps)["FROM"])
    assert [rest for step, rest in steps if step == "USER"] == ["10001:10001"]
    assert steps.index(["USER", "10001:10001"]) > max(n for n, (step, _) in enumerate(steps) if step in ("RUN", "COPY"))
    # As the Makefile installs, so that the same environment results; what only some deployments need, they ask for.
    installs = [
        command
        for step, rest in steps
        if step == "RUN" and not rest.startswith('test -z "$EXECUTORS" ||')
        for command in re.findall(r"uv pip install[^&]*", rest)
    ]
    made = re.findall(r"uv pip install --python \$\(BIN\)[^\n]*", (PROJECT / "Makefile").read_text())
    assert [without_place(command) for command in installs] == [without_place(command) for command in made]
    written = (PROJECT / "Dockerfile").read_text()
    assert not re.search(r"(PASSWORD|SECRET|TOKEN|_KEY)", written)
    assert re.search(r"pip install uv==[\d.]+ ", written)


def without_place(command: str) -> list[str]:
    """The arguments of an installation, less which Python it is for."""
    arguments = shlex.split(re.sub(r"--python \S+|--system", "", command))
    return [argument for argument in arguments if not argument.startswith("$")]
