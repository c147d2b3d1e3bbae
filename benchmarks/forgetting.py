"""What a fine-tune forgot: general questions asked of the base model and of fine-tuned ones.

    python benchmarks/forgetting.py [FILE_OR_FOLDER...]

Peer: the base model of `qa` as its releases have it, in the same run, on the same questions
(`evaluation/general_questions.toml`), asked as the gate asks them. Of a folder every GGUF file in it is asked; with
nothing named, what this home has fine-tuned (after `make run`). Shares of questions answered right; intervals are 95 %,
paired bootstrap over questions, as the gate's.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np

from millrace.applications import load_application
from millrace.engines.base_model import base_model_path
from millrace.engines.converted import exact_file
from millrace.engines.openvino import OpenVinoEngine
from millrace.evaluation.comparison import compare_general
from millrace.evaluation.general import answer_general, general_questions, general_set_id
from millrace.policies import TokenPrice
from millrace.settings import Settings

FREE = TokenPrice(prompt_million_tokens=0, completion_million_tokens=0)
THREADS = os.cpu_count() or 1


def scores_of(weights: Path) -> tuple[np.ndarray, float]:
    """What the model's answers are worth, and how many seconds they took."""
    engine = OpenVinoEngine(weights, cache_gb=0, threads=THREADS)
    try:
        began = time.perf_counter()
        answers = answer_general(engine, general_questions(), FREE)
        return np.array([answer.score for answer in answers]), time.perf_counter() - began
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", type=Path, nargs="*", help="GGUF files, or folders with such files")
    settings = Settings()
    named = parser.parse_args().tuned or [settings.home / "training"]
    files = [file for one in named for file in (sorted(one.rglob("*.gguf")) if one.is_dir() else [one])]
    if not files:
        print(f"nothing fine-tuned in {', '.join(map(str, named))}; name a GGUF file")
        return
    application = load_application(settings, "qa")
    base = exact_file(base_model_path(application.generator), settings.cache)
    known, seconds = scores_of(base)
    print(f"{len(known)} questions, set {general_set_id(general_questions())}; {THREADS} threads")
    print(f"{base.name}: {known.mean():.3f} ({seconds:.0f} s)", flush=True)
    for file in files:
        scores, seconds = scores_of(file)
        found = compare_general(known, scores, application.gate, seed=0)
        print(f"{file.name}: {found.candidate:.3f} ({seconds:.0f} s); ", end="")
        print(f"{found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f}), ", end="")
        print(f"{int((scores < known).sum())} lost, {int((scores > known).sum())} gained", flush=True)


if __name__ == "__main__":
    main()
