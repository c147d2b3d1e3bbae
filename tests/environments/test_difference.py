"""Two environments side by side: what differs, what is equal, and what the caller may not read."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from millrace.applications import load_application
from millrace.cli import app
from millrace.environments.access import lake_wall
from millrace.environments.access.matrix import READS
from millrace.environments.description import record_description, recorded_description
from millrace.environments.difference import Part, compare_environments
from millrace.errors import LakehouseError, SettingsError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.storage import Key, own_store
from millrace.lakehouse.tables import OPS_CURSORS, OPS_ENVIRONMENT, PLATFORM
from millrace.private_files import write_private
from millrace.releases import prompt_registry, published_split, registry
from millrace.releases.split import Split
from millrace.settings import Settings
from millrace.stack.versitygw import Versitygw
from tests.conftest import COMMIT, TEMPLATE, copy_declarations, free_port
from tests.environments.conftest import As
from tests.environments.test_walls import register

SECRET = "a secret that nobody is to see"


@pytest.fixture
def alone(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"applications": copy_declarations(tmp_path)})


def in_staging(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update={"environment": "staging", **changes})


def compared(settings: Settings, left: str = "dev", right: str = "staging") -> dict[str, Part]:
    return {part.name: part for part in compare_environments(settings, left, right)}


def values(part: Part) -> dict[str, tuple[str | None, str | None]]:
    return {one.name: (one.left, one.right) for one in part.differences}


def test_code_settings_and_declarations_are_compared_as_each_environment_wrote_them_down(alone: Settings) -> None:
    record_description(alone, run="test")
    record_description(in_staging(alone, commit="", threads=3), run="test")
    record_description(in_staging(alone, commit="b" * 40, threads=4), run="test")
    found = compared(alone)
    assert values(found["code"])["commit"] == (COMMIT, "b" * 40)
    assert values(found["settings"]) == {
        "MILLRACE_COMMIT": (f'"{COMMIT}"', f'"{"b" * 40}"'),
        "MILLRACE_ENVIRONMENT": ('"dev"', '"staging"'),
        "MILLRACE_THREADS": ("2", "4"),
    }
    assert found["settings"].equal > 20
    assert (values(found["declarations"]), found["declarations"].equal > 100) == ({}, True)
    declaration = alone.applications / "handbook.toml"
    declaration.write_text(declaration.read_text() + "\n[training]\nepochs = 7\n")
    record_description(alone, run="test")
    assert values(compared(alone)["declarations"]) == {"handbook.training.epochs": ("7", "1")}


def test_of_secrets_only_whether_they_are_equal_is_kept_and_told(alone: Settings) -> None:
    secrets = {"api_key": SECRET, "completion_key": SECRET, "spark_remote": f"sc://host:1/;token={SECRET[:8]}"}
    staging = Settings(**alone.model_dump() | {"environment": "staging"} | secrets)
    for side in (alone, staging):
        record_description(side, run="test")
    found = compared(alone)
    differ = {"MILLRACE_API_KEY": (None, "set"), "MILLRACE_COMPLETION_KEY": ("set", "another")}
    assert (values(found["secrets"]), found["secrets"].equal) == (differ, 1)  # pseudonyms are the same
    assert set(map(len, recorded_description(staging).secrets.values())) == {4}
    row = Lake.of(staging, PLATFORM).read(OPS_ENVIRONMENT, ["content"]).to_pylist()[0]["content"]
    for secret in (SECRET, "test pseudonym key", SECRET[:8]):
        assert secret not in row
    assert "token=…" in row


def test_an_environment_that_never_described_itself_is_not_taken_for_equal(alone: Settings) -> None:
    record_description(alone, run="test")
    found = compared(alone)
    for name in ("code", "settings", "secrets", "declarations"):
        assert (found[name].equal, values(found[name])) == (0, {})
        (unread,) = found[name].unread
        assert (unread.environment, unread.name) == ("staging", "")
        assert "staging has not described itself" in unread.why
    with pytest.raises(LakehouseError, match="or `millrace env record`"):
        recorded_description(in_staging(alone))
    with pytest.raises(SettingsError, match="there is no environment 'live'; there are dev, staging, prod"):
        compare_environments(alone, "dev", "live")


def test_tables_are_compared_by_version_rows_and_columns(alone: Settings) -> None:
    rows = pa.Table.from_pylist([{"reader": "r", "table": "t", "version": 1}], schema=OPS_CURSORS.rows_schema)
    for environment in ("dev", "staging"):
        Lake.of(alone.model_copy(update={"environment": environment}), "qa").merge(OPS_CURSORS, rows, run="test")
    assert (values(compared(alone)["tables"]), compared(alone)["tables"].equal) == ({}, 7)
    more = rows.set_column(0, rows.schema.field("reader"), pa.array(["other"]))
    Lake.of(in_staging(alone), "qa").merge(OPS_CURSORS, more, run="test")
    name = "qa/ops/cursors"
    was, now = values(compared(alone)["tables"])[name]
    assert (was, now) == ("version 1, 1 rows", "version 2, 2 rows")
    Lake.of(in_staging(alone), "handbook").merge(OPS_CURSORS, rows, run="test")
    assert values(compared(alone)["tables"]).keys() == {name, "handbook/ops/cursors"}
    # As an older Millrace left it.
    from deltalake import write_deltalake

    uri = Lake.of(in_staging(alone), "qa").uri(OPS_CURSORS)
    extra = pa.table({**{n: more[n] for n in more.column_names}, "lag": pa.array([1], pa.int64())})
    write_deltalake(f"{uri}-old", extra)
    Path(uri).rename(f"{uri}-new")
    Path(f"{uri}-old").rename(uri)
    told = values(compared(alone)["tables"])
    assert told[f"{name} column lag"] == (None, "int64")
    assert told[f"{name} column written_by"] == ("string not null", None)


@pytest.mark.slow
def test_a_lake_in_a_store_that_the_stack_keeps_is_read_with_the_callers_credential_too(
    alone: Settings, object_store: Versitygw
) -> None:
    in_store = {"lake_uri": "s3://kept-by-the-stack/lake", "object_store_port": object_store.port}
    dev = Settings(**alone.model_dump() | in_store)
    keys = {identity: Key(identity, f"the kept secret of {identity}") for identity in READS}
    for identity, key in keys.items():
        (path := own_store(dev) / "keys" / identity).parent.mkdir(parents=True, exist_ok=True)
        write_private(path, key.secret_key)
        object_store.create_user(key)
    known = dev.model_copy(update={"object_store_port": 0, "lake_endpoint": object_store.url})
    lake_wall.apply(known, object_store.root, {identity: identity for identity in READS})
    for environment in ("staging", "prod"):
        record_description(dev.model_copy(update={"environment": environment}), run="test")
    found = compared(dev, "staging", "prod")  # dev reads prod, and not staging
    (unread,) = found["settings"].unread
    assert (unread.environment, "does not let dev read" in unread.why) == ("staging", True)
    assert {one.environment for one in found["tables"].unread} == {"staging"}


def test_models_prompts_and_permissions_are_read_with_the_callers_credential_and_what_it_may_not_read_is_named(
    ask_as: As, alone: Settings, tmp_path: Path
) -> None:
    """The suite's environments share one server, so only what this test made is looked at."""

    def asked_by(identity: str, environment: str) -> dict[str, Part]:
        asking = ask_as(identity, environment).model_copy(update={"applications": alone.applications})
        return compared(asking, "staging", "prod")

    handbook = load_application(alone, "handbook")
    for identity, content in (("staging", "one"), ("staging", "two"), ("prod", "two")):
        register(ask_as(identity), handbook, tmp_path, content)
    registered = registry.versions(ask_as("staging"), handbook)
    (first, one), (_, two) = [(version, tags[registry.RELEASE_TAG]) for version, tags in registered.items()][-2:]
    published_split.publish_split(ask_as("staging"), "handbook", Split(sequence=1, champion=first))
    published_split.publish_split(ask_as("prod"), "handbook", Split(sequence=1, champion="1"))
    prompt_registry.register_prompt(ask_as("staging"), handbook, TEMPLATE, run="test")

    found = asked_by("prod", "prod")  # prod reads staging
    models = values(found["models"])
    assert models[f"handbook {one}"] == (f"version {first}", None)
    assert models["handbook champion"] == (f"{one}, version {first}", f"{two}, version 1")
    prompts = values(found["prompts"])
    assert [name.split()[0] for name, (left, right) in prompts.items() if left and not right].count(
        "handbook.prompt"
    ) == 1
    told = values(found["permissions"])
    assert told["mlflow: prod on registered_model *"] == ("READ", "MANAGE")
    hidden = [one for one in found["permissions"].unread if one.name == "mlflow: everybody else"]
    assert [one.environment for one in hidden] == ["staging", "prod"]
    assert "what others may, its administrator" in hidden[0].why

    found = asked_by("dev", "dev")  # dev doesn't read staging
    for name in ("models", "prompts"):
        (unread,) = found[name].unread
        assert (unread.environment, found[name].equal, values(found[name])) == ("staging", 0, {})
        assert "does not let dev" in unread.why
    told = values(found["permissions"])
    assert told["mlflow: dev on registered_model *"] == ("nothing", "READ")


def test_a_person_reads_the_difference_and_a_program_gets_it_as_json(
    alone: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("home", "applications", "commit"):
        monkeypatch.setenv(f"MILLRACE_{name.upper()}", str(getattr(alone, name)))
    monkeypatch.setenv("MILLRACE_MLFLOW_PORT", str(free_port()))  # where nothing answers
    run = CliRunner()
    monkeypatch.setenv("MILLRACE_ENVIRONMENT", "staging")
    assert run.invoke(app, ["env", "record"]).output.startswith(f"staging, commit {COMMIT}: ")
    monkeypatch.setenv("MILLRACE_ENVIRONMENT", "dev")
    monkeypatch.setenv("MILLRACE_THREADS", "7")
    run.invoke(app, ["env", "record"])
    told = run.invoke(app, ["env", "diff", "dev", "staging"])
    assert told.exit_code == 0, told.output
    assert "\nsettings: 2 differ, " in told.output
    assert "models: not compared" in told.output
    assert "dev can't be read: MLflow at" in told.output
    (line,) = [line for line in told.output.splitlines() if "MILLRACE_THREADS" in line]
    assert line.split()[:2] == ["MILLRACE_THREADS", "7"]
    parts = {
        part["name"]: part for part in json.loads(run.invoke(app, ["env", "diff", "dev", "staging", "--json"]).output)
    }
    assert {"name": "MILLRACE_ENVIRONMENT", "left": '"dev"', "right": '"staging"'} in parts["settings"]["differences"]
    dev, staging = parts["models"]["unread"]
    assert (dev["environment"], staging["environment"]) == ("dev", "staging")
    assert "has no workspaces (MILLRACE_MLFLOW_WORKSPACES), so what is in it is of dev alone" in staging["why"]
