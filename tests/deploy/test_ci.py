"""The pipeline of `deploy/ci` against the forge's schema, the Makefile and the settings; no forge was at hand."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from millrace.settings import PROJECT, Settings

WORKFLOW = PROJECT / "deploy" / "ci" / "github.yaml"


@pytest.fixture(scope="module")
def jobs() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


@pytest.mark.slow
def test_it_is_a_workflow_as_github_reads_it() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


def test_it_goes_from_lint_to_prod_one_after_the_other(jobs: dict[str, dict[str, Any]]) -> None:
    assert list(jobs) == ["lint", "unit", "test", "staging", "promote"]
    assert [job.get("needs") for job in jobs.values()] == [None, *list(jobs)[:-1]]
    assert [jobs[name]["environment"] for name in ("staging", "promote")] == ["staging", "prod"]


def test_every_step_is_a_target_of_the_makefile(jobs: dict[str, dict[str, Any]]) -> None:
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(commands) == len(jobs)
    targets = set(re.findall(r"^([a-z][\w-]*):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        made = re.fullmatch(r"make ([a-z-]+)", command)
        assert made, command
        assert made[1] in targets


def test_promoting_takes_its_release_as_it_is_said_and_nothing_else() -> None:
    def said(**given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", "-o", ".venv/.installed", "promote", "BIN=tests/deploy/said"],
            cwd=PROJECT,
            env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | given,
            capture_output=True,
            text=True,
        )

    assert "make promote VERSION=7" in said().stderr
    assert said(VERSION="7; $(shell id) `id`").stdout.splitlines()[-1] == (
        "release copy 7; $(shell id) `id` --from staging"
    )


def test_what_reads_and_writes_the_lake_is_told_where_it_is_and_by_which_key(jobs: dict[str, dict[str, Any]]) -> None:
    for name in ("staging", "promote"):
        for setting in ("URI", "ENDPOINT", "ACCESS_KEY", "SECRET_KEY"):
            assert f"MILLRACE_LAKE_{setting}" in jobs[name]["env"], name


def test_every_setting_in_it_is_one_and_nothing_secret_is_in_it(jobs: dict[str, dict[str, Any]]) -> None:
    given = {name: value for job in jobs.values() for name, value in job.get("env", {}).items()}
    known = {f"MILLRACE_{name}".upper() for name in Settings.model_fields}
    assert {name for name in given if name.startswith("MILLRACE_")} <= known
    secret = [value for name, value in given.items() if "KEY" in name or "PASSWORD" in name]
    assert secret
    assert all(re.fullmatch(r"\$\{\{ secrets\.\w+ \}\}", value) for value in secret)
    # What a caller types is never part of a command's text.
    assert "${{" not in "".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
