"""Whether learning people's preferences (DPO) adds anything to learning their answers (SFT).

    python benchmarks/preferences.py --data FOLDER [--train N] [--pairs N] [--held-out N] [--words N] [--folder FOLDER]

FOLDER has `qa-feedback/dev_feedback.json`: GitHub allenai/FineGrainedRLHF, there in `tasks/qa_feedback/data` (Wu and
others, 2023, arXiv:2306.01693). Of 500 questions with passages it has four answers of a model, people's choice between
each two of them (one vote a pair; ties are left out), and the first answer as people corrected it.

Peer: SFT alone, in the same run, on the same held-out questions. Everything is trained by our program as the reference
application's `[training]` declares it: SFT from the base model, on the corrected answers of the training questions (the
preferred answer where there is none); DPO from that very file, which is also its reference, on those questions'
preferences. Questions that share an article are on one side. Every model is measured from its GGUF file.

- `mean log p`, the primary measure: share of a held-out question's preferences where the preferred answer has the
  greater mean log-probability per token, the end of the turn included.
- `sum log p`: the same by the sum over the tokens, which favours short answers.
- `reward`: the same by what DPO calls the implicit reward, the sum less SFT's sum. SFT has 0.5 by definition.
- `token-F1`: of greedy answers against the corrected ones, on held-out questions that have one.
- `tokens`: mean length of these answers; DPO is known to lengthen them.

All are means over questions, so that one with many preferences counts as much as another; intervals are 95 %, paired
bootstrap over questions. Where it is stopped, the same command with `--folder` goes on.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from millrace.applications import Training, load_application
from millrace.engines.base_model import base_model_path
from millrace.engines.converted import exact_file
from millrace.scoring.bootstrap import mean_difference
from millrace.scoring.overlap import token_f1
from millrace.settings import Settings
from millrace.training.batches import encode
from millrace.training.export import write_merged
from millrace.training.files import replace_text
from millrace.training.launch import run_program
from millrace.training.loop import load
from millrace.training.measure import measure
from millrace.training.objectives import log_probabilities, padded
from millrace.training.spec import PROGRAM, Spec

FILE = "qa-feedback/dev_feedback.json"
CHECKPOINT_STEPS = 4
MOST_TOKENS = 192
"""Of a generated answer. Nine corrected ones in ten have at most 143."""


@dataclass(frozen=True)
class Asked:
    """A question with what people said about its answers."""

    question: str
    articles: frozenset[str]
    prompt: str
    answers: tuple[str, ...]
    corrected: str
    """Empty: there is none."""
    preferred: tuple[tuple[int, int], ...]
    """The better and the worse answer's position."""

    @cached_property
    def wanted(self) -> str:
        """What SFT learns."""
        wins = [sum(better == i for better, _ in self.preferred) for i in range(len(self.answers))]
        return self.corrected or self.answers[wins.index(max(wins))]


def asked_of(row: dict[str, Any], words: int) -> Asked:
    passages = [" ".join(sentences).split()[: words // len(row["passages"])] for _, *sentences in row["passages"]]
    text = "\n\n".join(" ".join(passage) for passage in passages)
    votes = zip(combinations(range(4), 2), row["preference"], strict=True)
    return Asked(
        question=row["question"],
        articles=frozenset(title for title, *_ in row["passages"]),
        prompt=f"{text}\n\nQuestion: {row['question']}\nAnswer only from the text above.",
        answers=tuple(row[f"prediction {number}"].strip() for number in range(1, 5)),
        corrected=(row["feedback"].get("corrected-prediction") or "").strip(),
        preferred=tuple(pair if vote == 1 else pair[::-1] for pair, vote in votes if vote),
    )


def hashed(*content: object) -> str:
    return sha256(repr(content).encode()).hexdigest()[:16]


def split(questions: Sequence[Asked], held_out: int) -> tuple[list[Asked], list[Asked]]:
    """To train on and to ask, each in an order without meaning; how many are asked doesn't change the order."""
    groups: list[list[Asked]] = []
    for one in questions:
        touching = [group for group in groups if any(one.articles & other.articles for other in group)]
        groups = [group for group in groups if group not in touching] + [sum(touching, [one])]
    order = sorted(groups, key=lambda group: hashed(group[0].question))
    asked: list[Asked] = []
    while order and len(asked) < held_out:
        asked += order.pop(0)
    return [one for group in reversed(order) for one in group], asked[:held_out]


def tuned(base: Path, training: Training, examples: list[dict[str, str]], folder: Path, **dpo: Any) -> Path:
    """The file of what `examples` teach `base`. Its name is of all that; what is there already isn't made again."""
    declared = training.model_dump(include=set(Spec.model_fields)) | dpo
    target = folder / f"{hashed(PROGRAM, base.name, declared, examples)}.gguf"
    run = target.with_suffix("")
    run.mkdir(parents=True, exist_ok=True)
    path = run / "examples.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    # A tuned base as torch reads it is of no use to others: it stays out of the common cache.
    cache = folder if dpo else Settings().cache
    given = {"base": base, "cache": cache, "examples": path, "folder": run, "checkpoint_steps": CHECKPOINT_STEPS}
    spec = Spec.model_validate(given | declared)
    if not spec.result.exists():
        run_program(spec, threads=os.cpu_count() or 1, watch=lambda: None, launcher="local")
    result = json.loads(spec.result.read_text())
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, int | float))
    print(f"{spec.method}: {numbers}", flush=True)
    if not target.exists():
        write_merged(base, spec.adapter, target)
    return target


def measured(weights: Path, cache: Path, asked: Sequence[Asked], folder: Path) -> dict[str, Any]:
    """Of each question, `said`: the sum of each answer's log-probabilities and its number of tokens; `answer`, what the
    model says, and its `tokens`."""
    path = folder / f"{hashed(weights.name, [(one.prompt, one.answers) for one in asked])}.json"
    if path.exists():
        return json.loads(path.read_text())
    import torch

    tokenizer, model = load(weights, cache)
    model.eval()
    tokens = partial(tokenizer.encode, add_special_tokens=False)
    said = []
    with torch.no_grad():
        for one in asked:
            encoded = [encode(one.prompt, answer, tokens) for answer in one.answers]
            said.append([(log_probabilities(padded(model, [e])).item(), len(e.answer)) for e in encoded])
    prompts = [one.prompt for one in asked]
    answers = measure(weights, prompts, max_new_tokens=MOST_TOKENS, alone=0, threads=os.cpu_count() or 1).answers
    found = {"said": said, "answer": answers, "tokens": [len(tokens(answer)) for answer in answers]}
    replace_text(path, json.dumps(found))
    return found


Worth = Callable[[int, int], float]
"""Of an answer: the question's position and its own."""


def agreement(asked: Sequence[Asked], worth: Worth) -> np.ndarray:
    """Share of each question's preferences that `worth` agrees with; worth as much is half."""
    signs = [[np.sign(worth(i, a) - worth(i, b)) for a, b in one.preferred] for i, one in enumerate(asked)]
    return np.array([(1 + np.mean(those)) / 2 for those in signs if those])


def scores(asked: Sequence[Asked], found: dict[str, Any], peer: dict[str, Any]) -> dict[str, np.ndarray]:
    """Each measure's values, one a question that it is defined for."""
    said, reference = found["said"], peer["said"]
    pairs = [(answer, one.corrected) for answer, one in zip(found["answer"], asked, strict=True) if one.corrected]
    return {
        "mean log p": agreement(asked, lambda i, a: said[i][a][0] / said[i][a][1]),
        "sum log p": agreement(asked, lambda i, a: said[i][a][0]),
        "reward": agreement(asked, lambda i, a: said[i][a][0] - reference[i][a][0]),
        "token-F1": np.array([token_f1(answer, corrected) for answer, corrected in pairs]),
        "tokens": np.array(found["tokens"], dtype=float),
    }


def told(peer: np.ndarray, one: np.ndarray, sign: str = "+") -> str:
    """How much more `one` is, with its interval."""
    more = mean_difference(peer, one, 0.95, 10_000, 0)
    return f"{more.estimate:{sign}8.3f} ({more.low:{sign}.3f} to {more.high:{sign}.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"has {FILE}")
    parser.add_argument("--train", type=int, default=96, help="questions to learn from")
    parser.add_argument("--pairs", type=int, default=192, help="of their preferences, how many DPO learns at most")
    parser.add_argument("--held-out", type=int, default=48, help="questions to measure on")
    parser.add_argument("--words", type=int, default=120, help="of the passages, in a prompt")
    parser.add_argument("--folder", type=Path, help="keep everything here, and go on with what is there")
    arguments = parser.parse_args()
    if arguments.data is None:
        print(f"name the folder that has {FILE} with --data; --help says where anyone gets it")
        return
    if not (arguments.data / FILE).is_file():
        parser.error(f"{arguments.data} has no {FILE}; --help says where anyone gets it")
    began, settings = time.perf_counter(), Settings()
    rows = json.loads((arguments.data / FILE).read_text())
    questions = [asked_of(row, arguments.words) for row in rows if row["passages"]]
    learnt, asked = split(questions, arguments.held_out)
    learnt = learnt[: arguments.train]
    # One preference of every question, then another of every question.
    order = sorted((i, n) for n, one in enumerate(learnt) for i in range(len(one.preferred)))[: arguments.pairs]
    pairs = [(learnt[n], *learnt[n].preferred[i]) for i, n in order]
    preferences = [{"prompt": q.prompt, "chosen": q.answers[a], "rejected": q.answers[b]} for q, a, b in pairs]
    application = load_application(settings, "qa")
    training, base = application.training, exact_file(base_model_path(application.generator), settings.cache)
    print(f"{base.name}; {len(learnt)} questions and {len(pairs)} of their preferences to learn;", end=" ")
    print(f"{len(asked)} others with {sum(len(one.preferred) for one in asked)} preferences; {os.cpu_count()} threads")
    dpo = {"method": "dpo", "beta": training.dpo.beta, "learning_rate": training.dpo.learning_rate}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).resolve()
        sft = tuned(base, training, [{"prompt": one.prompt, "answer": one.wanted} for one in learnt], folder)
        files = {"base": base, "SFT": sft, "SFT, DPO": tuned(sft, training, preferences, folder, **dpo)}
        found = {
            name: measured(file, settings.cache if file == base else folder, asked, folder)
            for name, file in files.items()
        }
    people = np.mean([len(one.corrected.split()) for one in asked if one.corrected])
    words = (f"{np.mean([len(answer.split()) for answer in one['answer']]):.0f}" for one in found.values())
    print(f"words of a corrected answer {people:.0f}, of the models' {', '.join(words)}")
    values = {name: scores(asked, one, found["SFT"]) for name, one in found.items()}
    print(f"{'':<12}{'':<10}{'':>8}{'':<24}more than SFT")
    for kind, peer in values["SFT"].items():
        for name in values:
            if (kind, name) != ("reward", "base"):
                one = values[name][kind]
                difference = "" if name == "SFT" else told(peer, one)
                print(f"{kind:<12}{name:<10}{told(np.zeros_like(one), one, ''):<32}{difference}".rstrip())
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
