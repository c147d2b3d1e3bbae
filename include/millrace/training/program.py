"""The training program: SmolLM2 from GGUF, LoRA, DeepSpeed ZeRO-2. One copy runs in every process of a fine-tune.

Run under any launcher that sets RANK, LOCAL_RANK and WORLD_SIZE:
`python -m millrace.training.program --spec spec.json`. It reads the spec and the examples that it names and writes
into the spec's folder: progress, the last checkpoint, the adapter, the result. It knows no lake, no MLflow and no
release. Killed at any step, it goes on from the last checkpoint when it is started again.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from millrace.engines.converted import hugging_face_folder
from millrace.errors import MillraceError, TrainingError
from millrace.training.batches import Encoded, Schedule, encode, schedule, split_held_out
from millrace.training.spec import TARGETS, Spec, read_spec

MINIMUM = 8
"""Examples below which nothing is trained."""
SHOWN = 4
"""Held-out prompts whose greedy answers are written into the result; the export is compared with them."""
ANSWER_TOKENS = 32
"""Of each of these answers, at most."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the result is written, 2 when the program gave up (then the failure's file says why)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--rendezvous", help="where the processes meet (file:///…); left out: MASTER_ADDR, MASTER_PORT")
    parser.add_argument("--leash", action="store_true", help="die when standard input closes: the launcher is gone")
    given = parser.parse_args(arguments)
    if given.leash:
        threading.Thread(target=_die_with_launcher, daemon=True).start()
    try:
        spec = read_spec(given.spec)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        _train(spec, given.rendezvous)
    except (MillraceError, ValidationError) as error:
        print(error, file=sys.stderr)
        with contextlib.suppress(OSError):  # the disk may be what is full
            _replace(spec.failure, str(error))
        # Not sys.exit: the other processes may wait in a collective operation that never completes.
        sys.stderr.flush()
        os._exit(2)
    return 0


def _train(spec: Spec, rendezvous: str | None) -> None:
    # Before the processes meet: of those that have met, transformers lets only the first one write.
    base_folder = hugging_face_folder(spec.base, spec.cache)
    deepspeed = _deepspeed()
    import torch
    from peft import LoraConfig, get_peft_model

    deepspeed.init_distributed(
        "gloo" if deepspeed.get_accelerator().device_name() == "cpu" else None,
        auto_mpi_discovery=False,
        verbose=False,
        init_method=rendezvous,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    rank = torch.distributed.get_rank()
    if torch.distributed.get_world_size() != spec.processes:
        raise TrainingError(
            f"the spec wants {spec.processes} processes, the launcher started {torch.distributed.get_world_size()}; "
            "start as many as application.training.processes says"
        )
    torch.manual_seed(spec.seed)
    tokenizer, base = _load(base_folder)
    prompts, examples, left_out = _examples(spec, tokenizer)
    training, held_out = split_held_out(len(examples), spec.held_out, spec.seed)
    plan = schedule(
        [examples[i].tokens for i in training],
        epochs=spec.epochs,
        processes=spec.processes,
        micro_batch=spec.micro_batch,
        accumulation=spec.gradient_accumulation,
        seed=spec.seed,
    )
    blocks = base.config.num_hidden_layers
    adapted = range(max(0, blocks - spec.lora_layers) if spec.lora_layers else 0, blocks)
    model = get_peft_model(
        base,
        LoraConfig(
            r=spec.lora_rank,
            lora_alpha=2 * spec.lora_rank,
            target_modules=list(TARGETS),
            layers_to_transform=[*adapted],
        ),
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=spec.deepspeed_config(len(plan)).model_dump(mode="json"),
    )
    seconds = _steps(spec, engine, plan, [examples[i] for i in training], rank)
    engine.eval()
    measured = [examples[i] for i in held_out]
    after = _held_out_loss(engine.module, measured, spec, rank)
    with engine.module.disable_adapter():
        before = _held_out_loss(engine.module, measured, spec, rank)
    if rank == 0:
        _save_adapter(engine.module, spec.adapter)
        result = {
            "steps": len(plan),
            "examples": len(training),
            "left_out": left_out,
            "held_out": len(held_out),
            "held_out_loss": after,
            "base_held_out_loss": before,
            "tokens": sum(examples[training[i]].tokens for step in plan for batch in step for b in batch for i in b),
            "seconds": seconds,
            "answers": [
                {"prompt": prompts[i], "answer": _greedy(engine.module, tokenizer, examples[i])}
                for i in held_out[:SHOWN]
            ],
        }
        _replace(spec.result, json.dumps(result))
        shutil.rmtree(spec.checkpoints, ignore_errors=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _steps(spec: Spec, engine: Any, plan: Schedule, examples: list[Encoded], rank: int) -> float:
    """All optimizer steps that are not in a checkpoint yet; returns the seconds of all steps, earlier ones included."""
    import torch

    done, spent = _resume(spec, engine, rank)
    engine.train()
    for number, step in enumerate(plan[done:], done + 1):
        started = time.perf_counter()
        rate = engine.optimizer.param_groups[0]["lr"]
        total = torch.zeros(())
        for micro in step:
            loss = _loss(engine, [examples[i] for i in micro[rank]])
            engine.backward(loss)
            engine.step()
            total += loss.detach().cpu() / len(step)
        # What every process saw, so that all of them stop at the same step.
        torch.distributed.all_reduce(total)
        mean = total.item() / spec.processes
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss was {mean} at step {number} of {len(plan)}; lower training.learning_rate "
                f"(now {spec.learning_rate:g}) or look for a broken example"
            )
        elapsed = time.perf_counter() - started
        spent += elapsed
        if rank == 0:
            tokens = sum(examples[i].tokens for micro in step for batch in micro for i in batch)
            line = {"step": number, "of": len(plan), "loss": mean, "learning_rate": rate}
            with spec.progress.open("a") as file:
                file.write(json.dumps(line | {"tokens": tokens, "seconds": elapsed}) + "\n")
        if number % spec.checkpoint_steps == 0 and number < len(plan):
            _checkpoint(spec, engine, number, spent, rank)
    return spent


def _checkpoint(spec: Spec, engine: Any, step: int, seconds: float, rank: int) -> None:
    """Keep the last one. A pointer is replaced only when every process has written its part."""
    import torch

    tag = f"step-{step}"
    try:
        engine.save_checkpoint(
            str(spec.checkpoints),
            tag=tag,
            save_latest=False,
            exclude_frozen_parameters=True,
            client_state={"step": step},
        )
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when a disk is full
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"step {step} can't be kept in {spec.checkpoints}: {reason}; free disk space, then run the task again"
        ) from error
    torch.distributed.barrier()
    if rank == 0:
        _replace(spec.checkpoints / "last.json", json.dumps({"tag": tag, "step": step, "seconds": seconds}))
        for other in spec.checkpoints.glob("step-*"):
            if other.name != tag:
                shutil.rmtree(other, ignore_errors=True)


def _resume(spec: Spec, engine: Any, rank: int) -> tuple[int, float]:
    """Steps that are done and the seconds they took. Progress beyond the checkpoint is forgotten: it comes again."""
    pointer = spec.checkpoints / "last.json"
    step, seconds = 0, 0.0
    if pointer.exists():
        last = json.loads(pointer.read_text())
        path, _ = engine.load_checkpoint(str(spec.checkpoints), tag=last["tag"], load_module_strict=False)
        if path is None:
            raise TrainingError(
                f"the checkpoint {spec.checkpoints / last['tag']} is not whole; remove {spec.checkpoints}"
            )
        step, seconds = last["step"], last["seconds"]
    if rank == 0:
        lines = spec.progress.read_text().splitlines() if spec.progress.exists() else []
        _replace(spec.progress, "".join(f"{line}\n" for line in lines[:step]))
    return step, seconds


def _loss(model: Any, examples: Sequence[Encoded]) -> Any:
    """Mean cross entropy over the answers' tokens of one micro-batch.

    Examples are aligned at their ends, so that only the last positions go through the vocabulary's projection: it
    is a fifth of this model's work, and prompts are most of the tokens.
    """
    import torch

    width = max(example.tokens for example in examples)
    kept = max(len(example.answer) for example in examples)
    ids = torch.zeros((len(examples), width), dtype=torch.long)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    wanted = torch.full((len(examples), kept), -100)
    for row, example in enumerate(examples):
        ids[row, width - example.tokens :] = torch.tensor(example.prompt + example.answer)
        mask[row, width - example.tokens :] = 1
        wanted[row, kept - len(example.answer) :] = torch.tensor(example.answer)
    # One example needs no mask, and attention without one is faster.
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if len(examples) > 1 else {}
    device = model.device
    logits = model(
        input_ids=ids.to(device),
        use_cache=False,
        logits_to_keep=kept + 1,
        **{name: value.to(device) for name, value in padded.items()},
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), wanted.flatten().to(device), ignore_index=-100
    )


def _held_out_loss(model: Any, examples: Sequence[Encoded], spec: Spec, rank: int) -> float:
    """Mean over examples, shared out over the processes."""
    import torch

    total = torch.zeros(())
    with torch.no_grad():
        for example in examples[rank :: spec.processes]:
            total += _loss(model, [example]).cpu()
    torch.distributed.all_reduce(total)
    return total.item() / len(examples)


def _greedy(model: Any, tokenizer: Any, example: Encoded) -> str:
    """What the adapted model answers."""
    import torch

    ids = torch.tensor([example.prompt]).to(model.device)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _examples(spec: Spec, tokenizer: Any) -> tuple[list[str], list[Encoded], int]:
    """Prompts and encoded examples that are not too long, and how many are."""
    tokenize = partial(tokenizer.encode, add_special_tokens=False)
    given = [json.loads(line) for line in spec.examples.read_text().splitlines()]
    fitting = [
        (example["prompt"], encoded)
        for example in given
        if (encoded := encode(example["prompt"], example["answer"], tokenize)).tokens <= spec.max_tokens
    ]
    if len(fitting) < MINIMUM:
        raise TrainingError(
            f"{len(fitting)} of {len(given)} training examples have at most {spec.max_tokens} tokens, "
            f"at least {MINIMUM} are needed; raise training.max_tokens, or gather more examples"
        )
    return [prompt for prompt, _ in fitting], [encoded for _, encoded in fitting], len(given) - len(fitting)


def _load(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model


def _save_adapter(model: Any, target: Path) -> None:
    building = target.with_name(f".{target.name}")
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(building, save_embedding_layers=False)
    building.rename(target)


def _deepspeed() -> Any:
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed takes a torch that was built for CUDA as a sign of a GPU.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collectives are compiled when a process starts, which needs a C++ compiler and saves nothing
    # for gradients as small as an adapter's. Nothing else looks here; probing all ops would start compilers, too.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def _replace(path: Path, text: str) -> None:
    """Write so that a reader, or a crash, finds the old text or the new one."""
    building = path.with_name(f".{path.name}.{os.getpid()}")
    with building.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    building.replace(path)


def _die_with_launcher() -> None:
    # Not sys.stdin: a thread that waits in its buffer makes the interpreter abort when the program ends.
    while os.read(0, 4096):
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
