"""What a fine-tune's answers are worth: against its base model, and against worked examples in the prompt.

    python benchmarks/answers.py [--data FOLDER] [--corpora NAME ...] [--questions N] [--examples N] [--shots N]

Peers: the base model of `qa` as it is, and with N worked examples, which are shown as turns that came before the
question. The fine-tune is made of the same base model by the training program, on N questions. All three are asked the
same held-out questions with the same passages by the same engine, greedy. No document has questions on both sides.

- `qa`: questions that the application's documents answer, in its own words and split; with the document that holds the
  answer and the next one.
- `covid-qa`: experts' questions on research articles, answered by spans of them. `covid-qa/covid-qa-cc-by.json` in the
  folder: of github.com/deepset-ai/COVID-QA the articles that say CC BY (SQuAD's format).
- `qa-feedback`: questions that people asked a search engine, with passages of Wikipedia; the answer is a model's as
  people corrected it. `qa-feedback/dev_feedback.json` in the folder: of github.com/allenai/FineGrainedRLHF.

For the last two, passages are what the application's chunker and embedder find nearest among the chunks of the
question's document: the right one may be missed. About half of the documents are for training; questions whose passages
are of the same articles count as one document. The templates are the application's own and two of a study's choices, as
what people answered is short or long.

Scores are token-F1, averaged over each document's questions and then over documents; intervals are 95 %, paired
bootstrap over documents. Seconds are the processor's over the threads, which is what a machine with nothing else to do
takes: of all answers together, eight at once, and of the training.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from quantised import Text, questions_of, tuned

from millrace.applications import Application, Generation, load_application
from millrace.engines.base_model import base_model_path
from millrace.engines.converted import exact_file
from millrace.engines.engine import Message
from millrace.engines.openvino import OpenVinoEngine
from millrace.prompts.templates import BUILT_IN
from millrace.releases.prompt import render
from millrace.retrieval.chunk import passages
from millrace.retrieval.embed import Embedder, embedded_text
from millrace.scoring.bootstrap import Floats, mean_difference
from millrace.scoring.overlap import token_f1
from millrace.settings import Settings
from millrace.sources.questions import Question, Split
from millrace.training.measure import AT_ONCE

LONGEST = 640
"""Tokens of a prompt with its answer: what `tuned` trains on at most."""
THREADS = os.cpu_count() or 1

Texts = tuple[Text, ...]
Asked = tuple[Question, str]
"""A question and its prompt."""
With = TypeVar("With")


def known(document: str, number: int, question: str, answer: str) -> Question:
    """A question, on the side that its document's name decides."""
    split: Split = "training" if int(mixed(document), 16) % 2 else "evaluation"
    return Question(f"{document} {number}", question.strip(), answer.strip(), document, None, split)


def mixed(text: str) -> str:
    """To sort and to split by: without meaning."""
    return hashlib.sha256(text.encode()).hexdigest()


def covid_qa(folder: Path) -> Iterator[tuple[Question, Texts]]:
    for article in json.loads((folder / "covid-qa/covid-qa-cc-by.json").read_text())["data"]:
        for part in article["paragraphs"]:
            text = part["context"].strip()
            texts = (Text(text.splitlines()[0], text),)
            for number, one in enumerate(part["qas"]):
                yield known(str(part["document_id"]), number, one["question"], one["answers"][0]["text"]), texts


def qa_feedback(folder: Path) -> Iterator[tuple[Question, Texts]]:
    rows = json.loads((folder / "qa-feedback/dev_feedback.json").read_text())
    rows = [row for row in rows if row["passages"] and row["feedback"].get("corrected-prediction", "").strip()]
    # Articles that one question has passages of belong together, and so on: all get one name.
    names = {title: title for row in rows for title, *_ in row["passages"]}
    before: dict[str, str] = {}
    while names != before:
        before = dict(names)
        for row in rows:
            titles = [title for title, *_ in row["passages"]]
            names |= dict.fromkeys(titles, min(names[title] for title in titles))
    for number, row in enumerate(rows):
        texts = tuple(Text(title, " ".join(sentences)) for title, *sentences in row["passages"])
        yield known(names[texts[0].title], number, row["question"], row["feedback"]["corrected-prediction"]), texts


@dataclass(frozen=True)
class Corpus:
    """How a file's questions are read and asked."""

    read: Callable[[Path], Iterator[tuple[Question, Texts]]]
    template: str
    max_new_tokens: int


CORPORA = {
    "covid-qa": Corpus(covid_qa, BUILT_IN["built_in.quote"], 48),
    "qa-feedback": Corpus(qa_feedback, BUILT_IN["built_in.plain"], 96),
}


def evenly(questions: Sequence[tuple[Question, With]], count: int) -> list[tuple[Question, With]]:
    """At most so many: one of each document, then another of each."""
    seen: Counter[str] = Counter()
    turns = []
    for one in sorted(questions, key=lambda one: mixed(one[0].question_id)):
        turns.append((seen[one[0].document_id], one))
        seen[one[0].document_id] += 1
    return [one for _, one in sorted(turns, key=lambda turn: turn[0])][:count]


def sides(
    questions: Sequence[tuple[Question, With]], examples: int, held_out: int
) -> tuple[list[tuple[Question, With]], list[tuple[Question, With]]]:
    """What to train on, and what to ask."""
    learn, ask = ([one for one in questions if (one[0].split == "training") is side] for side in (True, False))
    return evenly(learn, examples), evenly(ask, held_out)


def with_passages(
    chosen: Sequence[tuple[Question, Texts]], corpus: Corpus, application: Application, embedder: Embedder
) -> list[Asked]:
    """Each question with the chunks of its texts that are nearest, best first, as the retriever gives them."""

    @cache
    def indexed(texts: Texts) -> tuple[list[Text], np.ndarray]:
        chunks = [Text(one.title, text) for one in texts for text in passages(one.text, application.chunking)]
        return chunks, embedder.embed([embedded_text(chunk.title, chunk.text) for chunk in chunks])

    asked = []
    for question, texts in chosen:
        chunks, vectors = indexed(texts)
        nearest = np.argsort(-(vectors @ embedder.embed([question.question])[0]))[: application.retrieval.chunks]
        asked.append((question, render(corpus.template, question.question, [chunks[i] for i in nearest])))
    return asked


def turns(question: Question, prompt: str) -> list[Message]:
    return [Message("user", prompt), Message("assistant", question.answer)]


def fitting(engine: OpenVinoEngine, asked: Sequence[Asked]) -> list[Asked]:
    """Those that the training doesn't leave out as too long."""
    return [one for one in asked if engine.count_tokens(turns(*one)) <= LONGEST]


def processor_seconds() -> float:
    """Of this process and of those that it waited for, over the threads."""
    return sum(os.times()[:4]) / THREADS


@dataclass(frozen=True)
class Row:
    """One system's numbers."""

    scores: Floats
    """Of each document."""
    seconds: float


def answered(engine: OpenVinoEngine, asked: Sequence[Asked], shown: Sequence[Asked], tokens: int) -> Row:
    """Ask everything, each with the same turns before it."""
    config = Generation(max_new_tokens=tokens, temperature=0)
    before = [message for one in shown for message in turns(*one)]
    began = processor_seconds()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = list(pool.map(lambda one: engine.generate([*before, Message("user", one[1])], config).text, asked))
    seconds = processor_seconds() - began
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for text, (question, _) in zip(said, asked, strict=True):
        scores[question.document_id].append(token_f1(text, question.answer))
    return Row(np.array([np.mean(one) for one in scores.values()]), seconds)


def compare(name: str, learn: list[Asked], ask: list[Asked], base: Path, *, shots: int, tokens: int) -> None:
    """Ask all three, and print the corpus's part of the table."""
    engine = OpenVinoEngine(base, cache_gb=1, threads=THREADS)
    fit, held_out = fitting(engine, learn), fitting(engine, ask)
    long = len(learn) + len(ask) - len(fit) - len(held_out)
    documents = len({question.document_id for question, _ in held_out})
    there = np.mean([question.answer.lower() in prompt.lower() for question, prompt in held_out])
    print(f"\n{name}: {len(held_out)} questions held out, on {documents} documents; {len(fit)} to train on; ", end="")
    print(f"{long} too long; {there:.0%} of the prompts hold the answer word by word", flush=True)
    rows = {"base": answered(engine, held_out, [], tokens)}
    print(told("base", rows["base"]), flush=True)
    few = f"{shots} examples"
    rows[few] = answered(engine, held_out, fit[:shots], tokens)
    print(told(few, rows[few]), flush=True)
    engine.close()
    with tempfile.TemporaryDirectory() as scratch:
        began = processor_seconds()
        weights = tuned(base, fit, Path(scratch), THREADS)
        trained = processor_seconds() - began
        engine = OpenVinoEngine(weights, cache_gb=1, threads=THREADS)
        row = answered(engine, held_out, [], tokens)
        engine.close()
    print(told("fine-tuned", row), end="")
    for peer in rows.values():
        found = mean_difference(peer.scores, row.scores, 0.95, 10_000, 0)
        print(f"   {found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f})", end="")
    print(f"   trained in {trained:.0f} s", flush=True)


def told(name: str, row: Row) -> str:
    return f"{name:<14}{row.scores.mean():>8.3f}{row.seconds:>7.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the corpora that people wrote; empty: only `qa`")
    parser.add_argument("--corpora", nargs="+", choices=["qa", *CORPORA], default=["qa", *CORPORA])
    parser.add_argument("--questions", type=int, default=120, help="to hold out of each corpus, at most")
    parser.add_argument("--examples", type=int, default=160, help="to train on of each corpus, at most")
    parser.add_argument("--shots", type=int, default=3, help="of these, shown in the peer's prompts")
    arguments = parser.parse_args()
    began, settings = time.perf_counter(), Settings()
    application = load_application(settings, "qa")
    base = exact_file(base_model_path(application.generator), settings.cache)
    print(f"{base.name}; {THREADS} threads")
    print(f"{'':<14}{'F1':>8}{'s':>7}   fine-tuned against base      against examples")
    for name in arguments.corpora:
        if name == "qa":
            learn, ask = sides(questions_of(application), arguments.examples, arguments.questions)
            tokens = application.generation.max_new_tokens
        elif arguments.data:
            corpus, embedder = CORPORA[name], Embedder(application.retrieval.embedding_model, settings.cache, THREADS)
            both = sides(list(corpus.read(arguments.data)), arguments.examples, arguments.questions)
            learn, ask = (with_passages(side, corpus, application, embedder) for side in both)
            tokens = corpus.max_new_tokens
        else:
            print(f"\n{name}: not measured; --data names a folder that has it")
            continue
        compare(name, learn, ask, base, shots=arguments.shots, tokens=tokens)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
