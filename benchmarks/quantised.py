"""What a model costs in fewer bits, and what it then still answers.

    python benchmarks/quantised.py [--weights FILE] [--examples N] [--questions N] [--alone N]

Peer: the same weights in F16, in the same run, on the same questions. The weights are the base model's after a short
fine-tune on N questions of the documents (0: as they are). Each format is loaded in a process of its own, so that the
peak of its memory is its own. Tokens/s are counted from an answer's first token on, one answer at a time, and over
answers of eight at once, prompts included; by the processor's seconds over the threads, which is what a machine with
nothing else to do takes. Quality is the mean token-F1 on questions that were not trained on, each asked with the
document that holds its answer and the next one. Intervals are 95 %, paired bootstrap over questions. `Q4_1 by gguf` is
what the gguf package writes, whose zero points the engine rounds (`training/quantise.py`).

The goal: twice the tokens/s of F16 one by one, or half its peak memory, at a loss of token-F1 whose interval excludes
the gate's margin.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from millrace.applications import Application, load_application
from millrace.engines.base_model import base_model_path
from millrace.engines.gguf_file import open_gguf, read_weights, rewrite
from millrace.releases.prompt import render
from millrace.scoring.bootstrap import mean_difference, ratio_of_means
from millrace.scoring.overlap import token_f1
from millrace.settings import Settings
from millrace.sources.questions import Question, derive_questions
from millrace.sources.reading import read_source
from millrace.training.export import write_merged
from millrace.training.launch import run_program
from millrace.training.measure import Measured, measure
from millrace.training.quantise import in_format, write_quantised
from millrace.training.spec import Spec

PEER = "F16"


class Text:
    """A document as a template sees it."""

    def __init__(self, title: str, text: str) -> None:
        self.title, self.text = title, text


def questions_of(application: Application) -> list[tuple[Question, str]]:
    """Every question that the documents answer, with its prompt, in an order without meaning."""
    documents = [one for source in application.sources for one in read_source(source)]
    texts = [Text(one.title, one.content.decode()) for one in documents]
    place = {one.document_id: number for number, one in enumerate(documents)}
    rows = [
        {"document_id": one.document_id, "source": one.source, "section": one.section, "text": text.text}
        for one, text in zip(documents, texts, strict=True)
    ]
    found = []
    for question in derive_questions(pa.Table.from_pylist(rows), application):
        at = place[question.document_id]
        chunks = [texts[at], texts[(at + 1) % len(texts)]]
        found.append((question, render(application.prompt.template, question.question, chunks)))
    return sorted(found, key=lambda one: hashlib.sha256(one[0].question_id.encode()).hexdigest())


def tuned(
    base: Path, asked: list[tuple[Question, str]], folder: Path, threads: int, learning_rate: float = 1e-3
) -> Path:
    examples = folder / "examples.jsonl"
    examples.write_text("".join(json.dumps({"prompt": p, "answer": q.answer}) + "\n" for q, p in asked))
    spec = Spec(
        base=base,
        cache=Settings().cache,
        examples=examples,
        folder=folder,
        epochs=1,
        learning_rate=learning_rate,
        lora_rank=16,
        lora_layers=0,
        micro_batch=1,
        gradient_accumulation=2,
        max_tokens=640,
        processes=2,
        seed=0,
    )
    run_program(spec, threads=threads, watch=lambda: None, launcher="local")
    target = folder / f"{base.name.split('.')[0]}-tuned.gguf"
    write_merged(base, spec.adapter, target)
    return target


def write_plain(source: Path, target: Path) -> None:
    """Q4_1 as the gguf package quantises, the embedding in Q8_0."""
    from gguf import GGMLQuantizationType, quantize

    reader = open_gguf(source)
    kinds = {
        tensor.name: GGMLQuantizationType.Q8_0 if tensor.name == "token_embd.weight" else GGMLQuantizationType.Q4_1
        for tensor in reader.tensors
        if len(tensor.shape) > 1
    }
    rewrite(
        reader,
        target,
        kinds=kinds,
        encode=lambda tensor: quantize(read_weights(tensor), kinds[tensor.name]),
        fields={"general.file_type": 3},
    )


@dataclass(frozen=True)
class Row:
    """One format's numbers."""

    size: int
    measured: Measured
    scores: np.ndarray

    def told(self, name: str) -> str:
        one = self.measured
        told = f"{name:<13}{self.size / 1e6:>6.0f}{one.peak_mib:>7.0f}{one.resident_mib:>7.0f}"
        return f"{told}{one.tokens_per_second:>9.1f}{one.tokens_per_second_together:>7.1f}{self.scores.mean():>8.3f}"

    def against(self, peer: "Row", margin: float | None = None) -> str:
        """The ratios; with a margin also whether the goal is reached."""
        paces = zip(self.measured.seconds_per_token, peer.measured.seconds_per_token, strict=True)
        both = np.array([pair for pair in paces if None not in pair])
        faster = ratio_of_means(both[:, 0], both[:, 1], 0.95, 10_000, 0)
        loss = mean_difference(peer.scores, self.scores, 0.95, 10_000, 0)
        memory = self.measured.peak_mib / peer.measured.peak_mib
        told = f"   {loss.estimate:+.3f} ({loss.low:+.3f} to {loss.high:+.3f})"
        told += f"   {faster.estimate:.2f} ({faster.low:.2f} to {faster.high:.2f})"
        told += f"   {memory:.2f}"
        if margin is None:
            return told
        reached = (faster.estimate >= 2 or memory <= 0.5) and loss.low >= -margin
        return f"{told}   {'reached' if reached else 'no'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a GGUF file; empty: the base model of `qa`")
    parser.add_argument("--examples", type=int, default=160, help="questions to fine-tune on; 0: none")
    parser.add_argument("--questions", type=int, default=1000, help="questions to ask at most")
    parser.add_argument("--alone", type=int, default=24, help="of them, questions that are also asked one by one")
    arguments = parser.parse_args()
    began, threads = time.perf_counter(), os.cpu_count() or 1
    application = load_application(Settings(), "qa")
    questions = questions_of(application)
    held_out = [one for one in questions if one[0].split != "training"][: arguments.questions]
    prompts = [prompt for _, prompt in held_out]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = arguments.weights or base_model_path(application.generator)
        if arguments.examples:
            trained = [one for one in questions if one[0].split == "training"][: arguments.examples]
            weights = tuned(weights, trained, folder, threads)
        peer = weights if in_format(weights, "f16") else folder / "f16.gguf"
        if peer != weights:
            write_quantised(weights, peer, "f16")
        files = {PEER: peer}
        for name in ("q8_0", "q4_1", "q4_0"):
            files[name.upper()] = folder / f"{name}.gguf"
            write_quantised(peer, files[name.upper()], name)
        files["Q4_1 by gguf"] = folder / "plain.gguf"
        write_plain(peer, files["Q4_1 by gguf"])
        told = f"{weights.name}, fine-tuned on {arguments.examples} questions" if arguments.examples else weights.name
        print(f"{told}; {len(prompts)} others asked; {threads} threads")
        print(f"{'':<13}{'file':>6}{'peak':>7}{'after':>7}{'alone':>9}{'8':>7}{'token':>8}   against F16:")
        print(f"{'':<13}{'MB':>6}{'MiB':>7}{'MiB':>7}{'tok/s':>9}{'tok/s':>7}{'F1':>8}   token-F1", end="")
        print("                  tok/s alone           peak   goal", flush=True)
        margin = application.gate.quality_margin
        rows: dict[str, Row] = {}
        for name, file in files.items():
            tokens = application.generation.max_new_tokens
            one = measure(file, prompts, max_new_tokens=tokens, alone=arguments.alone, threads=threads)
            pairs = zip(one.answers, held_out, strict=True)
            scores = np.array([token_f1(answer, question.answer) for answer, (question, _) in pairs])
            rows[name] = Row(file.stat().st_size, one, scores)
            against = "" if name == PEER else rows[name].against(rows[PEER], margin)
            print(rows[name].told(name) + against, flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s; the gate's margin is {margin:g}")


if __name__ == "__main__":
    main()
