"""What one fine-tune is made of, as data: the file that the stage writes and the training program reads.

It knows neither torch nor DeepSpeed. DeepSpeed ignores a key that it doesn't know, so its configuration is a model
here that refuses one.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from millrace.applications import Training
from millrace.errors import TrainingError
from millrace.lakehouse.content import content_hash

PROGRAM = 4
"""Raise when the same spec gives other weights, or they are exported otherwise: earlier results are not reused then."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a block that get an adapter."""


PRUNED = "pruned.gguf"
"""In a fine-tune's folder, the weights that it starts from where blocks were removed."""
DECIDED = {
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr": "learning_rate",
}
"""DeepSpeed's keys that the program's own loop goes by, or its schedule overwrites: a value of their own would train
less than was said, or change nothing."""
OUT_OF_MEMORY = "out of memory"
"""How the program's last sentence begins where that was the reason."""


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimizerParams(Strict):
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    torch_adam: Literal[True] = True
    """DeepSpeed's own Adam for CPUs has to be compiled on the machine."""


class Optimizer(Strict):
    type: Literal["AdamW"] = "AdamW"
    params: OptimizerParams


class SchedulerParams(Strict):
    warmup_min_lr: float = Field(ge=0)
    warmup_max_lr: float = Field(gt=0)
    warmup_num_steps: int = Field(ge=1)
    warmup_type: Literal["linear"] = "linear"
    total_num_steps: int = Field(ge=1)


class Scheduler(Strict):
    type: Literal["WarmupDecayLR"] = "WarmupDecayLR"
    params: SchedulerParams


class Offload(Strict):
    """What waits in the machine's memory while the GPU doesn't need it."""

    device: Literal["cpu"]
    pin_memory: bool = True


class Zero(Strict):
    """What the processes share out instead of each holding it (Rajbhandari et al., 2020, arXiv:1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing; 1: the optimizer's states; 2: gradients, too; 3: weights, too, frozen ones included."""
    reduce_bucket_size: int = 5_000_000
    allgather_bucket_size: int = 5_000_000
    """Elements. The default of 500 million reserves gigabytes for an adapter of a few megabytes."""
    overlap_comm: bool | None = None
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    stage3_prefetch_bucket_size: int | None = Field(None, ge=0)
    stage3_param_persistence_threshold: int | None = Field(None, ge=0)
    stage3_max_live_parameters: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _the_stage_knows_them(self) -> Self:
        # DeepSpeed would take them and do nothing.
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 has no optimizer of DeepSpeed's")
        for name in sorted(name for name in self.model_fields_set if name == "offload_param" or "stage3" in name):
            if getattr(self, name) is not None and self.stage != 3:
                raise ValueError(f"{name} needs stage 3, and the stage is {self.stage}")
        return self


class Bf16(Strict):
    """Computing with 16 bits a number; what is trained is kept with 32 beside it."""

    enabled: bool


class DeepSpeedConfig(Strict):
    """Every key that is handed to DeepSpeed."""

    train_micro_batch_size_per_gpu: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    gradient_clipping: float = Field(default=1.0, gt=0)
    steps_per_print: int = 1_000_000
    bf16: Bf16 = Bf16(enabled=False)
    zero_optimization: Zero = Zero()
    optimizer: Optimizer
    scheduler: Scheduler

    @model_validator(mode="after")
    def _32_bits_are_kept(self) -> Self:
        if self.bf16.enabled and self.zero_optimization.stage == 0:
            raise ValueError("bf16 needs stage 1, 2 or 3: stage 0 gives nobody the 32-bit numbers of what is trained")
        return self


class Spec(Strict):
    """One fine-tune. Paths are absolute; processes on several machines see them all."""

    base: Path
    """The weights to start from, a GGUF file."""
    cache: Path
    """Of the machine; the base is there as the program reads it (`engines/converted.py`)."""
    examples: Path
    """JSON lines with `prompt` (one user message) and `answer`; for dpo `chosen` and `rejected` instead of that."""
    folder: Path
    """Where the program writes; see the properties below."""
    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    method: Literal["sft", "dpo"] = "sft"
    beta: float = Field(default=0.1, gt=0)
    lora_rank: int = Field(ge=0)
    """0: no adapter, all weights are trained."""
    lora_layers: int = Field(ge=0)
    """Adapt the last so many blocks; 0: all."""
    micro_batch: int = Field(ge=1)
    gradient_accumulation: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    processes: int = Field(ge=1)
    seed: int
    checkpoint_steps: int = Field(default=10, ge=1)
    held_out: float = Field(default=0.08, gt=0, lt=1)
    """Share of the examples that only the loss at the end is measured on."""
    packing: bool = False
    evaluate_steps: int = Field(default=0, ge=0)
    """Steps between measurements on the development split; 0: there is no such split, the last step's weights stay."""
    patience: int = Field(default=3, ge=1)
    """Measurements in a row without a better one, after which training stops."""
    development: float = Field(default=0.08, gt=0, lt=1)
    """Share of the examples that is not held out, for early stopping."""
    deepspeed: dict[str, object] = {}
    """Overrides of the configuration that `deepspeed_config` makes, by section."""

    @model_validator(mode="after")
    def _known_keys(self) -> Self:
        self.deepspeed_config(total_steps=1)
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.lora_layers and not self.lora_rank:
            raise ValueError("lora_layers is for an adapter, and lora_rank = 0 trains all weights; leave it out")
        optimizer = self.deepspeed.get("optimizer")
        params = optimizer.get("params") if isinstance(optimizer, dict) else None
        named = self.deepspeed.keys() | (params.keys() if isinstance(params, dict) else set())
        for name, instead in DECIDED.items():
            if name in named:
                raise ValueError(f"deepspeed's {name} is decided by [training] {instead}; set that")
        return self

    @property
    def zero_stage(self) -> int:
        return self.deepspeed_config(total_steps=1).zero_optimization.stage

    @property
    def progress(self) -> Path:
        """A JSON line for each optimizer step."""
        return self.folder / "progress.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        """What was trained where there is an adapter: as peft saves it."""
        return self.folder / "adapter"

    @property
    def weights(self) -> Path:
        """What was trained where there is none: every weight, by transformers' names."""
        return self.folder / "weights.safetensors"

    @property
    def reference(self) -> Path:
        """What the base model thinks of each pair; made once."""
        return self.folder / "reference.json"

    @property
    def result(self) -> Path:
        """Written last; while it is there, the fine-tune is finished."""
        return self.folder / "result.json"

    @property
    def failure(self) -> Path:
        """One sentence, where the program gave up on purpose."""
        return self.folder / "failure.txt"

    @property
    def answers(self) -> Path:
        """What the trained weights answer to some of the examples, JSON with `question`, `prompt` and `answer` in each
        line; written before the result."""
        return self.folder / "answers.jsonl"

    def narrowed(self) -> "Spec | None":
        """The same steps in smaller micro-batches, which take less memory; None: they have one example already."""
        smaller = [size for size in range(self.micro_batch // 2, 0, -1) if self.micro_batch % size == 0]
        if not smaller:
            return None
        more = self.gradient_accumulation * self.micro_batch // smaller[0]
        return self.model_copy(update={"micro_batch": smaller[0], "gradient_accumulation": more})

    @property
    def step_examples(self) -> int:
        """Examples in one optimizer step, over all processes."""
        return self.processes * self.micro_batch * self.gradient_accumulation

    def deepspeed_config(self, total_steps: int) -> DeepSpeedConfig:
        """What DeepSpeed is started with: linear warm-up over a tenth of the steps, then linear decay to zero.

        Raises:
            ValidationError: an override has a key that DeepSpeed would ignore.
        """
        made = DeepSpeedConfig(
            train_micro_batch_size_per_gpu=self.micro_batch,
            gradient_accumulation_steps=self.gradient_accumulation,
            optimizer=Optimizer(params=OptimizerParams(lr=self.learning_rate)),
            scheduler=Scheduler(
                params=SchedulerParams(
                    # DeepSpeed gives the first step the lowest rate: zero would waste it.
                    warmup_min_lr=self.learning_rate / 10,
                    warmup_max_lr=self.learning_rate,
                    warmup_num_steps=max(2, total_steps // 10),
                    total_num_steps=max(3, total_steps),
                )
            ),
        ).model_dump(mode="json", exclude_none=True)
        return DeepSpeedConfig.model_validate(_merged(made, self.deepspeed))


OF_THE_SET = ("max_examples", "start", "replay", "teacher_chunks")
"""Fields of the declaration that the set and the weights show already."""


def fingerprint(training: Training, training_set: str, start_sha256: str, remove_blocks: int = 0) -> str:
    """Names what a fine-tune learns: the same fingerprint, the same weights. Sixteen hexadecimal digits."""
    learned = training.model_dump_json(exclude=set(OF_THE_SET))
    pruned = (remove_blocks,) if remove_blocks else ()
    return content_hash(PROGRAM, learned, training_set, start_sha256, *pruned)[:16]


def read_spec(path: Path) -> Spec:
    """Raises:
    TrainingError: the file isn't a spec; the message names the field.
    """
    try:
        return Spec.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TrainingError(
            f"the spec {path} can't be read: {error}; run the fine-tune's stage, it writes it"
        ) from None
    except ValidationError as error:
        raise TrainingError(f"the spec {path} is wrong: {told(error)}") from None


def told(error: ValidationError) -> str:
    """The problems that pydantic found, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or e['msg']}: {e['msg']} (got {e.get('input')!r})" for e in error.errors()
    )


def _merged(base: dict[str, object], over: dict[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
