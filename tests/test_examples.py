"""The examples that are programs say how they are used, so all that they import is there."""

import os
import runpy
import subprocess
import sys

import pytest

from millrace.applications import load_application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.settings import PROJECT, Settings
from tests.conftest import DECLARATIONS
from tests.environments.production import fill_prod

PROGRAMS = sorted((PROJECT / "examples").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=[program.stem for program in PROGRAMS])
def test_an_example_says_how_it_is_used_and_the_readme_names_it(
    program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out
    assert f"examples/{program.name}" in (PROJECT / "examples" / "README.md").read_text()


@pytest.mark.model
@pytest.mark.slow
def test_a_data_scientist_in_dev_finds_out_why_prod_answered_badly_and_can_change_nothing_there(
    settings: Settings,
) -> None:
    declared = settings.model_copy(update={"applications": DECLARATIONS})
    prod = fill_prod(declared, load_application(declared, "qa"), users=12)
    lake = Lake.of(prod, "qa")
    worst = lake.read(SILVER_FEEDBACK).sort_by([("rating", "ascending"), ("occurred_at", "descending")]).to_pylist()[0]
    before = {table.path: lake.version(table) for table in (SILVER_EXCHANGES, SILVER_FEEDBACK)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    ran = subprocess.run(
        [sys.executable, "examples/debug_an_answer.py"],
        cwd=PROJECT,
        env=environment
        | {
            "MILLRACE_HOME": str(settings.home),
            "MILLRACE_APPLICATIONS": str(DECLARATIONS),
            "MILLRACE_PACE": "demo",
            "MILLRACE_THREADS": "2",
        },
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = ran.stdout
    for said in (worst["question"], "Answer:     I do not know.", worst["correction"], "rel-0123456789abcdef"):
        assert said in told
    assert "Chunks in its prompt that are there still: 1 of 1" in told
    answers = [line.split(": ", 1)[1].strip() for line in told.splitlines() if line.startswith("Answered here with")]
    assert len(answers) == 2
    assert all(answers)
    refusals = [line for line in told.splitlines() if "may not write" in line]
    assert len(refusals) == 1
    assert "dev may not write silver/feedback of qa in prod" in refusals[0]
    assert "the wall is only code" in told
    assert {table.path: lake.version(table) for table in (SILVER_EXCHANGES, SILVER_FEEDBACK)} == before
