from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from millrace.applications import Training
from millrace.errors import TrainingError
from millrace.training.spec import Bf16, Spec, Zero, fingerprint, read_spec

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"gradient_cliping": 0.5}, "gradient_cliping"),
        ({"zero_optimization": {"stages": 3}}, "zero_optimization.stages"),
        ({"optimizer": {"params": {"learning_rate": 1e-3}}}, "optimizer.params.learning_rate"),
    ],
)
def test_a_misspelt_deepspeed_key_is_refused_by_its_name(
    make_spec: Callable[..., Spec], overrides: dict, named: str
) -> None:
    with pytest.raises(ValidationError, match=named):
        make_spec(deepspeed=overrides)


def test_an_override_reaches_the_configuration_and_leaves_its_neighbours(make_spec: Callable[..., Spec]) -> None:
    config = make_spec(deepspeed={"optimizer": {"params": {"weight_decay": 0.1}}}).deepspeed_config(100)
    assert config.optimizer.params.weight_decay == 0.1
    assert config.optimizer.params.lr == 1e-3
    assert config.scheduler.params.warmup_num_steps == 10


def test_a_spec_survives_its_file(make_spec: Callable[..., Spec], tmp_path: Path) -> None:
    spec = make_spec()
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    assert read_spec(tmp_path / "spec.json") == spec


def test_a_broken_spec_file_says_which_field(make_spec: Callable[..., Spec], tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(make_spec().model_dump_json().replace('"epochs":2', '"epochs":0'))
    with pytest.raises(TrainingError, match="epochs"):
        read_spec(path)
    with pytest.raises(TrainingError, match="can't be read"):
        read_spec(tmp_path / "none.json")


def test_a_fingerprint_changes_with_what_is_learnt_and_with_nothing_else() -> None:
    first = fingerprint(Training(), "train-a", "0" * 64)
    assert fingerprint(Training(max_examples=7), "train-a", "0" * 64) == first
    assert fingerprint(Training(epochs=3), "train-a", "0" * 64) != first
    assert fingerprint(Training(), "train-b", "0" * 64) != first
    assert fingerprint(Training(), "train-a", "1" * 64) != first
    changes: list[dict] = [{"method": "dpo"}, {"packing": True}, {"evaluate_steps": 5}, {"dpo": {"beta": 0.2}}]
    for change in changes:
        assert fingerprint(Training(**change), "train-a", "0" * 64) != first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": 0, "lora_layers": 2}, "lora_layers is for an adapter"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "zero_optimization.stage"),
        ({"deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}}, "offload_param needs stage 3"),
        ({"deepspeed": {"zero_optimization": {"stage3_prefetch_bucket_size": 9}}}, "needs stage 3, and the stage is 2"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}},
            "offload_optimizer needs stage 1, 2 or 3",
        ),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}, "offload_optimizer.device"),
        ({"deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}}, "bf16 needs stage 1, 2 or 3"),
        ({"deepspeed": {"bf16": {"enable": True}}}, "bf16.enable"),
        ({"deepspeed": {"gradient_accumulation_steps": 8}}, "is decided by .* gradient_accumulation; set that"),
        ({"deepspeed": {"train_micro_batch_size_per_gpu": 8}}, "is decided by .* micro_batch; set that"),
        ({"deepspeed": {"optimizer": {"params": {"lr": 1e-6}}}}, "lr is decided by .* learning_rate; set that"),
    ],
)
def test_what_would_be_ignored_or_can_not_work_is_refused(
    make_spec: Callable[..., Spec], changes: dict, said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        make_spec(**changes)


def test_smaller_micro_batches_make_the_same_steps_until_there_is_one_example(make_spec: Callable[..., Spec]) -> None:
    spec: Spec | None = make_spec(micro_batch=6, gradient_accumulation=1)
    seen = []
    while spec:
        seen.append((spec.micro_batch, spec.gradient_accumulation))
        spec = spec.narrowed()
    assert seen == [(6, 1), (3, 2), (1, 6)]


@pytest.mark.model
def test_deepspeed_knows_every_key_that_it_is_given(make_spec: Callable[..., Spec]) -> None:
    import inspect

    import torch
    from deepspeed.runtime import constants
    from deepspeed.runtime.lr_schedules import WarmupDecayLR
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    offload = {"device": "cpu", "pin_memory": False}
    zero = {"stage": 3, "offload_optimizer": offload, "offload_param": offload, "stage3_prefetch_bucket_size": 7}
    given = make_spec(deepspeed={"zero_optimization": zero}).deepspeed_config(100)
    config = given.model_dump(mode="json", exclude_none=True)  # as the program hands it over
    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization"}
    assert config.keys() <= known
    written = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert Zero.model_fields.keys() <= written
    read = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert (read.offload_param.device, read.prefetch_bucket_size) == ("cpu", 7)
    assert Bf16.model_fields.keys() <= DeepSpeedBF16Config.model_fields.keys()
    assert config["scheduler"]["params"].keys() <= inspect.signature(WarmupDecayLR).parameters.keys()
    adam = inspect.signature(torch.optim.AdamW).parameters.keys() | {"torch_adam"}
    assert config["optimizer"]["params"].keys() <= adam
