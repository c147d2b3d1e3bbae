"""What made a release, and which commit of the code runs: asked of a real checkout."""

import subprocess
from pathlib import Path

import pytest

from millrace.applications import Application, Training
from millrace.errors import ReleaseError
from millrace.releases import recipe
from millrace.releases.recipe import RECIPE_TAG, Recipe, read_recipe, running_commit
from millrace.settings import Settings


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, in which this code is."""
    monkeypatch.setattr(recipe, "PROJECT", folder := tmp_path / "checkout")
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "code.py").write_text("first")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=ann", "-c", "user.email=ann@localhost"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "why")
    return git(folder, "rev-parse", "HEAD")


def test_a_checkout_says_its_commit_and_whether_its_code_differs_from_it(checkout: Path) -> None:
    asked = Settings()
    first = git(checkout, "rev-parse", "HEAD")
    assert running_commit(asked) == first
    (checkout / "notes.txt").write_text("no code")
    assert running_commit(asked) == first
    (checkout / "include" / "more.py").write_text("new")
    assert running_commit(asked) == f"{first}-changed"
    second = commit(checkout)
    assert (running_commit(asked), second != first) == (second, True)
    (checkout / "include" / "code.py").write_text("second")
    assert running_commit(asked) == f"{second}-changed"


def test_code_that_is_installed_without_its_checkout_is_known_by_the_setting_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed := checkout / "include" / "site").mkdir()
    for where in (installed, checkout.parent):  # below somebody else's checkout; in none
        monkeypatch.setattr(recipe, "PROJECT", where)
        assert running_commit(Settings()) == ""
        assert running_commit(Settings(commit="a" * 40)) == "a" * 40


def test_a_recipe_keeps_the_form_and_the_declared_section_and_finds_what_is_declared_otherwise(qa: Application) -> None:
    made = Recipe.of(qa, "finetune", {"max_examples": 8, "teacher": None})
    assert read_recipe(made.tags, "qa@1") == made
    assert made.declared["lora_rank"] == 16
    assert made.differences(qa) == []
    other = qa.model_copy(update={"training": Training(epochs=2, lora_rank=8)})
    assert made.differences(other) == ["training.epochs is 2 and was 1", "training.lora_rank is 8 and was 16"]


@pytest.mark.parametrize(
    ("tags", "told"),
    [({}, r"qa@1 doesn't say how it was made .* or train it again"), ({RECIPE_TAG: "{}"}, "can't be understood")],
)
def test_a_release_that_does_not_say_how_it_was_made_is_told_so(tags: dict[str, str], told: str) -> None:
    with pytest.raises(ReleaseError, match=told):
        read_recipe(tags, "qa@1")
