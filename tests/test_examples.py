"""The examples that are programs say how they are used, so all that they import is there."""

import runpy
import sys

import pytest

from millrace.settings import PROJECT

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
