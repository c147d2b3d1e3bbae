"""What a model costs with fewer transformer blocks, and what it still answers before it is trained again.

    python benchmarks/pruned.py [--weights FILE] [--remove N ...] [--prompts N] [--questions N] [--alone N]

Peer: the same weights with all their blocks, in the same run, on the same questions. Blocks are chosen by their
influence (`training/prune.py`) on N questions of the documents; other questions are asked then, each with the document
that holds its answer and the next one. No row has had a recovery tune. Each file is loaded in a process of its own;
what is counted, and how, says `benchmarks/quantised.py`. Intervals are 95 %, paired bootstrap over questions.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from quantised import Row, questions_of

from millrace.applications import load_application
from millrace.engines.base_model import base_model_path
from millrace.scoring.overlap import token_f1
from millrace.settings import Settings
from millrace.training.measure import measure
from millrace.training.prune import prune

LONGEST = 640
"""Tokens of a prompt that the blocks' influence is measured on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a GGUF file; empty: the base model of `qa`")
    parser.add_argument("--remove", type=int, nargs="*", default=[2, 4, 8], help="how many blocks to leave out")
    parser.add_argument("--prompts", type=int, default=32, help="questions to measure influence on")
    parser.add_argument("--questions", type=int, default=200, help="questions to ask at most")
    parser.add_argument("--alone", type=int, default=24, help="of them, questions that are also asked one by one")
    arguments = parser.parse_args()
    began, threads = time.perf_counter(), os.cpu_count() or 1
    settings = Settings()
    application = load_application(settings, "qa")
    questions = questions_of(application)
    chosen_on = [prompt for question, prompt in questions if question.split == "training"][: arguments.prompts]
    held_out = [one for one in questions if one[0].split != "training"][: arguments.questions]
    prompts = [prompt for _, prompt in held_out]
    weights = arguments.weights or base_model_path(application.generator)
    with tempfile.TemporaryDirectory() as scratch:
        files = {"all blocks": weights}
        for remove in arguments.remove:
            name = f"without {remove}"
            files[name] = Path(scratch) / f"{remove}.gguf"
            made = prune(
                weights,
                files[name],
                chosen_on,
                remove=remove,
                cache=settings.cache,
                max_tokens=LONGEST,
                threads=threads,
            )
            print(f"{name}: {', '.join(str(block) for block in made.removed)}", flush=True)
        print(f"{weights.name}; {len(prompts)} questions asked; {threads} threads")
        print(f"{'':<13}{'file':>6}{'peak':>7}{'after':>7}{'alone':>9}{'8':>7}{'token':>8}   against all blocks:")
        print(f"{'':<13}{'MB':>6}{'MiB':>7}{'MiB':>7}{'tok/s':>9}{'tok/s':>7}{'F1':>8}   token-F1", end="")
        print("                  tok/s alone           peak", flush=True)
        peer = None
        for name, file in files.items():
            tokens = application.generation.max_new_tokens
            one = measure(file, prompts, max_new_tokens=tokens, alone=arguments.alone, threads=threads)
            pairs = zip(one.answers, held_out, strict=True)
            scores = np.array([token_f1(answer, question.answer) for answer, (question, _) in pairs])
            row = Row(file.stat().st_size, one, scores)
            print(row.told(name) + (row.against(peer) if peer else ""), flush=True)
            peer = peer or row
    print(f"\n{time.perf_counter() - began:.0f} s; the gate's margin is {application.gate.quality_margin:g}")


if __name__ == "__main__":
    main()
