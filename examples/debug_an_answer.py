"""Find out from dev why prod answered badly: the worst answer, all that led to it, and what another prompt makes of it.

Reads prod's feedback, exchanges and chunks with dev's credential, answers anew in this process, and shows at the end
that prod's tables can't be written from here."""

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application, load_application
from millrace.engines.engine import Message
from millrace.errors import LakehouseError, ReleaseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EXCHANGES, SILVER_FEEDBACK, Table, text
from millrace.releases.generator import declared_generator, open_engine, upstream_of
from millrace.releases.mlflow_server import mlflow_client
from millrace.releases.prompt import check_template, render
from millrace.retrieval.search import Hit
from millrace.settings import Settings, read_settings

RUN = "examples/debug_an_answer.py"
OF = "prod"
TRIED = """
{% for chunk in chunks %}### {{ chunk.title }}
{{ chunk.text }}

{% endfor %}Find the one line above that answers this question, and copy it: {{ question }}"""
"""The prompt that is tried, unless a file is given."""
PROBE = Table("ops", "written_from_elsewhere", (text("nothing"),), key=("nothing",))
"""A table that nobody reads: should the object store let us create it, no harm is done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--application", default="qa")
    parser.add_argument("--prompt", type=Path, help="a file with the template to try")
    given = parser.parse_args()
    settings = read_settings()
    application = load_application(settings, given.application)
    tried = given.prompt.read_text() if given.prompt else TRIED
    check_template(tried)
    prod = Lake.of(settings, application.name, environment=OF)

    said = worst(prod)
    exchange, chunks = led_to(prod, said)
    show(said, exchange, chunks)
    template, where = old_prompt(settings, application, exchange)
    print(f"\nIts prompt: {where}\n{template.strip()}")
    answers = answer_anew(settings, application, exchange["question"], chunks, (template, tried))
    print(f"\nAnswered here with that prompt: {answers[0]}\nAnswered here with the new one:  {answers[1]}")
    print(f"\n{write(prod, said)}")


def worst(prod: Lake) -> dict[str, Any]:
    """The feedback with the lowest rating, of several the newest."""
    order = [("rating", "ascending"), ("occurred_at", "descending")]
    found = prod.read(SILVER_FEEDBACK).sort_by(order).slice(0, 1).to_pylist()
    if not found:
        raise SystemExit(f"{OF} has no feedback in {prod.uri(SILVER_FEEDBACK)}; nothing to debug")
    return found[0]


def led_to(prod: Lake, said: dict[str, Any]) -> tuple[dict[str, Any], list[Hit]]:
    """The exchange that the feedback is about, and the chunks that were in its prompt and still are there."""
    where = pc.field("completion_id") == said["completion_id"]
    [exchange] = prod.read(SILVER_EXCHANGES, where=where).to_pylist()
    cited = exchange["citations"]
    columns = ["chunk_id", "document_id", "title", "uri", "text"]
    found = {
        row["chunk_id"]: row
        for row in prod.read(SILVER_CHUNKS, columns, where=pc.field("chunk_id").isin(cited)).to_pylist()
    }
    return exchange, [Hit(**found[key], score=0.0) for key in cited if key in found]


def old_prompt(settings: Settings, application: Application, exchange: dict[str, Any]) -> tuple[str, str]:
    """The template that the release answered with, or the declared one; and which of them it is."""
    if settings.mlflow_workspaces:  # Else the registry in reach is this environment's own, and has other releases.
        name, _, version = exchange["prompt_version"].rpartition("/")
        try:
            with mlflow_client(settings.model_copy(update={"environment": OF}), f"read prompt {name}") as client:
                return client.get_prompt_version(name, version).template, f"{name}/{version}, of {OF}'s registry"
        except ReleaseError as error:
            print(error)
    return (
        application.prompt.template,
        f"{exchange['prompt_version']}; {OF}'s registry is out of reach, so this is the declared one",
    )


def show(said: dict[str, Any], exchange: dict[str, Any], chunks: list[Hit]) -> None:
    print(f"The worst answer of {OF}: rated {said['rating']:g} at {said['occurred_at']:%Y-%m-%d %H:%M} UTC")
    print(f"Question:   {exchange['question']}\nAnswer:     {exchange['answer']}")
    print(f"Comment:    {said['comment'] or '-'}\nCorrection: {said['correction'] or '-'}")
    print(
        f"Release:    {exchange['release_version']} ({exchange['release_id']}), arm {exchange['arm'] or '-'}, "
        f"index build {exchange['index_build']}, {exchange['seconds'] or 0:.1f} s"
    )
    print(f"Chunks in its prompt that are there still: {len(chunks)} of {len(exchange['citations'])}")
    for chunk in chunks:
        print(f"  {chunk.title}: {' '.join(chunk.text.split())[:160]}")


def answer_anew(
    settings: Settings, application: Application, question: str, chunks: list[Hit], templates: tuple[str, ...]
) -> list[str]:
    """What the declared generator says to the question with these chunks, by template."""
    generator, folder = declared_generator(settings, application)
    engine = open_engine(
        generator, folder, upstream=upstream_of(settings), threads=settings.threads, cache_gb=settings.engine_cache_gb
    )
    try:
        return [
            engine.generate([Message("user", render(template, question, chunks))], application.generation).text.strip()
            for template in templates
        ]
    finally:
        engine.close()


def write(prod: Lake, said: dict[str, Any]) -> str:
    """What comes of the attempt to write prod's tables from here."""
    try:
        if "://" in prod.root:
            LocalEngine().create(prod.uri(PROBE), PROBE)  # Past the code's wall, straight to the object store's.
        else:
            better = {name: said[name] for name in SILVER_FEEDBACK.rows_schema.names} | {"rating": 1.0}
            row = pa.Table.from_pylist([better | {"content_hash": ""}], schema=SILVER_FEEDBACK.rows_schema)
            prod.merge(SILVER_FEEDBACK, row, run=RUN)
    except LakehouseError as refusal:
        if "://" in prod.root:
            return f"The object store refused to let this write in {OF}: {refusal}"
        return (
            f"The code refused to write in {OF}: {refusal}\nThis lake is a folder, so the wall is only code: whoever "
            "may write its files gets around it. In an object store, the store itself refuses, by credential."
        )
    raise SystemExit(f"NOT refused: who runs this may write {prod.uri(PROBE)}; take that right away, and the table")


if __name__ == "__main__":
    main()
