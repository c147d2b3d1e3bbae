"""What every process of a fine-tune does, from the base model to the result.

A Llama from GGUF, with an adapter or all its weights, is trained by DeepSpeed on an objective (`objectives.py`) in
the steps of a schedule (`batches.py`); where it was killed it goes on (`checkpoints.py`). How it was started is
`program.py`'s business.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from millrace.engines.chat import END_OF_TURN
from millrace.engines.converted import hugging_face_folder
from millrace.errors import TrainingError
from millrace.training.batches import (
    Encoded,
    Pair,
    Schedule,
    encode,
    schedule,
    split_development,
    split_held_out,
)
from millrace.training.checkpoints import Progress, best_file, keep, keep_best, resume
from millrace.training.files import replace_text
from millrace.training.objectives import Objective, Preference, Supervised, log_probabilities, padded
from millrace.training.spec import TARGETS, Spec
from millrace.training.stopping import Measured, best_of, exhausted
from millrace.training.weights import put_back, save_adapter, trained_weights, write_weights

MINIMUM = 8
"""Examples below which nothing is trained."""
SIDES = 3
"""To train on, to measure on, and to stop by: as many different prompts are needed."""
SHOWN = 8
"""Prompts whose greedy answers are written into the result, held-out ones first; the export is compared with them. A
flipped word counts for much in one answer, and for little in eight."""
ANSWER_TOKENS = 32
"""Of each of these answers, at most."""


def train(spec: Spec, rendezvous: str | None) -> None:
    """Write the spec's result.

    Args:
        rendezvous: where the processes meet (`file:///…`); None: at MASTER_ADDR, MASTER_PORT.

    Raises:
        TrainingError: the examples, the base or the configuration are unusable, or the loss is not a number.
    """
    # Before the processes meet: of those that have met, transformers lets only the first one write.
    hugging_face_folder(spec.base, spec.cache)
    deepspeed = _deepspeed()
    import torch

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
    zero = spec.deepspeed_config(total_steps=1).zero_optimization
    if (zero.offload_optimizer or zero.offload_param) and deepspeed.get_accelerator().device_name() == "cpu":
        raise TrainingError(
            "zero_optimization offloads from a GPU's memory to the machine's, and this machine has no GPU: it would "
            "change nothing; remove offload_optimizer and offload_param from [training.deepspeed]"
        )
    torch.manual_seed(spec.seed)
    tokenizer, base = load(spec.base, spec.cache)
    asked, examples, left_out = _examples(spec, tokenizer)
    prompts = [one["prompt"] for one in asked]
    training, held_out = split_held_out(prompts, spec.held_out, spec.seed)
    development: list[int] = []
    if spec.evaluate_steps:
        training, development = split_development(training, prompts, spec.development, spec.seed)
    plan = schedule(
        [examples[i].tokens for i in training],
        epochs=spec.epochs,
        processes=spec.processes,
        micro_batch=spec.micro_batch,
        accumulation=spec.gradient_accumulation,
        seed=spec.seed,
    )
    model = with_adapter(base, rank=spec.lora_rank, last=spec.lora_layers) if spec.lora_rank else base
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=spec.deepspeed_config(len(plan)).model_dump(mode="json", exclude_none=True),
    )
    # Before anything is resumed the model is the base: an adapter begins by adding nothing.
    engine.eval()
    objective = _objective(spec, engine, examples, rank)
    before = _measured(objective, engine, held_out, spec, rank)
    progress = _steps(spec, engine, objective, plan, training, development, rank)
    engine.eval()
    after = _measured(objective, engine, held_out, spec, rank)
    # Where weights are shared out, an answer takes every process.
    answers = [
        asked[i] | {"answer": _greedy(engine.module, tokenizer, examples[i].prompt)}
        for i in ([*held_out, *training][:SHOWN] if rank == 0 or spec.zero_stage == 3 else ())
    ]
    weights = trained_weights(engine.module, rank)
    if rank == 0:
        if spec.lora_rank:
            save_adapter(engine.module, weights, spec.adapter)
        else:
            write_weights(weights, spec.weights)
        replace_text(spec.answers, "".join(f"{json.dumps(one)}\n" for one in answers))
        done = plan[: progress.step]
        result = {
            "steps": progress.step,
            "examples": len(training),
            "left_out": left_out,
            "held_out": len(held_out),
            **{f"held_out_{name}": value for name, value in after.items()},
            "base_held_out_loss": before["loss"],
            "tokens": sum(examples[training[i]].tokens for step in done for batch in step for b in batch for i in b),
            "seconds": progress.seconds,
        }
        if progress.development:
            result["development"] = len(development)
            result |= {f"best_{name}": value for name, value in best_of(progress.development)._asdict().items()}
        replace_text(spec.result, json.dumps(result))
        shutil.rmtree(spec.checkpoints, ignore_errors=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _steps(
    spec: Spec,
    engine: Any,
    objective: Objective,
    plan: Schedule,
    training: list[int],
    development: list[int],
    rank: int,
) -> Progress:
    """All optimizer steps that are not in a checkpoint yet. In the end the engine has the weights to keep."""
    import torch

    progress = resume(spec, engine, rank)
    engine.train()
    for number, step in enumerate(plan[progress.step :], progress.step + 1):
        if exhausted(progress.development, spec.patience):
            break
        started = time.perf_counter()
        rate = engine.optimizer.param_groups[0]["lr"]
        total = torch.zeros((), device=engine.device)
        terms = sum(objective.terms(training[i]) for micro in step for batch in micro for i in batch)
        for micro in step:
            loss = objective.loss(engine, [training[i] for i in micro[rank]])
            # DeepSpeed takes the mean over processes and micro-batches. A step is the mean over all of its terms:
            # what is learnt doesn't depend on how it is cut.
            engine.backward(loss * (spec.processes * len(step) / terms))
            engine.step()
            total += loss.detach()
        # What every process saw, so that all of them stop at the same step.
        torch.distributed.all_reduce(total)
        mean = total.item() / terms
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss was {mean} at step {number} of {len(plan)}; lower training.learning_rate "
                f"(now {spec.learning_rate:g}) or look for a broken example"
            )
        elapsed = time.perf_counter() - started
        progress.step = number
        progress.seconds += elapsed
        tokens = sum(objective.tokens(training[i]) for micro in step for batch in micro for i in batch)
        line = {"step": number, "of": len(plan), "loss": mean, "learning_rate": rate}
        line |= {"tokens": tokens, "seconds": elapsed}
        if development and (number % spec.evaluate_steps == 0 or number == len(plan)):
            line["development_loss"] = _evaluate(spec, engine, objective, development, progress, rank)
        if rank == 0:
            with spec.progress.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if number % spec.checkpoint_steps == 0 and number < len(plan):
            keep(spec, engine, progress, rank)
    if progress.development and (best := best_of(progress.development)).step != progress.step:
        torch.distributed.barrier()
        put_back(engine.module, best_file(spec, best.step))
    return progress


def _evaluate(
    spec: Spec, engine: Any, objective: Objective, development: list[int], progress: Progress, rank: int
) -> float:
    """Measure on the development split, note it, keep the weights if they are the best ones. Returns the loss."""
    engine.eval()
    loss = _measured(objective, engine, development, spec, rank)["loss"]
    engine.train()
    if not math.isfinite(loss):
        raise TrainingError(
            f"the development loss was {loss} after step {progress.step}; lower training.learning_rate "
            f"(now {spec.learning_rate:g}) or look for a broken example"
        )
    progress.development.append(Measured(progress.step, loss))
    if best_of(progress.development).step == progress.step:
        keep_best(spec, engine, progress, rank)
    return loss


def _measured(objective: Objective, engine: Any, positions: Sequence[int], spec: Spec, rank: int) -> dict[str, float]:
    """Means over examples, shared out over the processes."""
    import torch

    total = torch.zeros(len(objective.measures), device=engine.device)
    mine = positions[rank :: spec.processes]
    # Where weights are shared out, every process takes part in every forward pass.
    idle = -(-len(positions) // spec.processes) - len(mine) if spec.zero_stage == 3 else 0
    with torch.no_grad():
        for position in mine:
            total += objective.measure(engine.module, position)
        for _ in range(idle):
            objective.measure(engine.module, positions[0])
    torch.distributed.all_reduce(total)
    return {name: value / len(positions) for name, value in zip(objective.measures, total.tolist(), strict=True)}


def _objective(spec: Spec, engine: Any, examples: Sequence[Any], rank: int) -> Objective:
    if spec.method == "sft":
        return Supervised(examples, packing=spec.packing)
    return Preference(examples, _reference(spec, engine, examples, rank), beta=spec.beta, packing=spec.packing)


def _reference(spec: Spec, engine: Any, pairs: Sequence[Pair], rank: int) -> list[list[float]]:
    """For each pair what `Preference` wants of the base model; made once, shared out over the processes."""
    import torch

    if spec.reference.exists():
        return json.loads(spec.reference.read_text())
    said = torch.zeros((len(pairs), 2), device=engine.device)
    with torch.no_grad():
        for turn in range(rank, len(pairs) + -len(pairs) % spec.processes, spec.processes):
            if turn < len(pairs) or spec.zero_stage == 3:
                position = min(turn, len(pairs) - 1)
                found = log_probabilities(padded(engine.module, pairs[position].sides))
                said[position] = found if turn < len(pairs) else 0
    torch.distributed.all_reduce(said)
    if rank == 0:
        replace_text(spec.reference, json.dumps(said.tolist()))
    return said.tolist()


def _greedy(model: Any, tokenizer: Any, prompt: Sequence[int]) -> str:
    """What the trained model answers."""
    import torch

    ids = torch.tensor([prompt]).to(model.device)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _examples(spec: Spec, tokenizer: Any) -> tuple[list[dict[str, str]], Sequence[Any], int]:
    """`question` and `prompt`, and encoded examples (pairs for dpo), of those that are not too long; how many are."""
    tokenize = partial(tokenizer.encode, add_special_tokens=False)

    def encoded(example: dict[str, str]) -> Encoded | Pair:
        sides = ("answer",) if spec.method == "sft" else ("chosen", "rejected")
        made = [encode(example["prompt"], example[side], tokenize) for side in sides]
        return made[0] if spec.method == "sft" else Pair(*made)

    given = [json.loads(line) for line in spec.examples.read_text().splitlines()]
    fitting = [(one, e) for one in given if (e := encoded(one)).longest <= spec.max_tokens]
    if len(fitting) < MINIMUM:
        raise TrainingError(
            f"{len(fitting)} of {len(given)} training examples have at most {spec.max_tokens} tokens, "
            f"at least {MINIMUM} are needed; raise training.max_tokens, or gather more examples"
        )
    if (different := len({one["prompt"] for one, _ in fitting})) < SIDES:
        raise TrainingError(
            f"the {len(fitting)} training examples have {different} different prompts, at least {SIDES} are needed to "
            "train on one and measure on another; gather examples of more questions"
        )
    asked = [{"question": one.get("question", one["prompt"]), "prompt": one["prompt"]} for one, _ in fitting]
    return asked, [e for _, e in fitting], len(given) - len(fitting)


def require_fitting(tokenizer: Any, vocabulary: int) -> None:
    """Raises:
    TrainingError: the tokenizer isn't that of a model with so many tokens that answers in ChatML.
    """
    ends = tokenizer.encode(END_OF_TURN, add_special_tokens=False)
    if len(tokenizer) > vocabulary or len(ends) != 1:
        raise TrainingError(
            f"the tokenizer doesn't fit the model: it has {len(tokenizer)} tokens, the model {vocabulary}, and "
            f"{END_OF_TURN!r} is {len(ends)} of them (1 is needed); declare a base model whose file holds its own"
        )


def load(base: Path, cache: Path) -> tuple[Any, Any]:
    """Tokenizer and model of the GGUF file `base`, the weights as 32-bit floats.

    Raises:
        TrainingError: they don't fit each other.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = hugging_face_folder(base, cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    require_fitting(tokenizer, model.config.vocab_size)
    return tokenizer, model


def with_adapter(base: Any, *, rank: int, last: int) -> Any:
    """The base, frozen, with a LoRA adapter (Hu et al., 2021, arXiv:2106.09685) to train.

    Args:
        last: so many of its last blocks are adapted; 0: all.
    """
    from peft import LoraConfig, get_peft_model

    blocks = base.config.num_hidden_layers
    adapted = range(max(0, blocks - last) if last else 0, blocks)
    return get_peft_model(
        base,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(TARGETS),
            layers_to_transform=[*adapted],
        ),
    )


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
