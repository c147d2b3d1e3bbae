"""What a fine-tune learns and forgets at several learning rates.

    python benchmarks/learning_rates.py [RATE...] [--questions N] [--examples N]

Peer: the base model of `qa` as its releases have it, in the same run. At each rate the training program teaches it N
questions that the application's documents answer; then both answer N others, of other documents, and the gate's general
questions (`evaluation/general_questions.toml`). Token-F1, and shares of general questions answered right with what the
gate would say of the difference; intervals are 95 %, paired bootstrap over questions.
"""

import argparse
import tempfile
from pathlib import Path

from answers import THREADS, answered, fitting, sides
from forgetting import scores_of
from quantised import questions_of, tuned

from millrace.applications import load_application
from millrace.engines.base_model import base_model_path
from millrace.engines.converted import exact_file
from millrace.engines.openvino import OpenVinoEngine
from millrace.evaluation.comparison import compare_general
from millrace.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rates", type=float, nargs="*", default=[4e-4, 6e-4, 1e-3])
    parser.add_argument("--questions", type=int, default=40, help="to hold out, at most")
    parser.add_argument("--examples", type=int, default=128, help="to train on, at most")
    given = parser.parse_args()
    settings = Settings(pace="demo")
    application = load_application(settings, "qa")
    base = exact_file(base_model_path(application.generator), settings.cache)
    learn, ask = sides(questions_of(application), given.examples, given.questions)
    engine = OpenVinoEngine(base, cache_gb=1, threads=THREADS)
    fit, held_out = fitting(engine, learn), fitting(engine, ask)
    row = answered(engine, held_out, [], application.generation.max_new_tokens)
    engine.close()
    known, _ = scores_of(base)
    print(f"{len(fit)} questions to learn, {len(held_out)} others, {len(known)} general ones; {THREADS} threads")
    print(f"{'base':<12}{row.scores.mean():>8.3f}{known.mean():>10.3f}", flush=True)
    for rate in given.rates:
        with tempfile.TemporaryDirectory() as scratch:
            weights = tuned(base, fit, Path(scratch), THREADS, rate)
            engine = OpenVinoEngine(weights, cache_gb=1, threads=THREADS)
            row = answered(engine, held_out, [], application.generation.max_new_tokens)
            engine.close()
            found = compare_general(known, scores_of(weights)[0], application.gate, seed=0)
        print(f"{rate:<12g}{row.scores.mean():>8.3f}{found.candidate:>10.3f}", end="")
        verdict = f"{'passes' if found.passed else 'refused'} at a margin of {application.gate.general_margin:g}"
        print(f"   {found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f}), {verdict}", flush=True)


if __name__ == "__main__":
    main()
