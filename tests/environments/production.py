"""A prod to take samples of: documents from the declared sources, and people who asked about them, rated, and said more
of themselves than they should have. Written by the code that writes prod, from an event log as a gateway leaves it."""

from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import SecretStr

from millrace.applications import Application
from millrace.environments.sample import publish_documents, publish_evaluation_sets, publish_exchanges
from millrace.evaluation.sets import freeze_evaluation_set
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_DOCUMENTS
from millrace.retrieval.chunk import refresh_chunks
from millrace.settings import Settings
from millrace.sources.completion_id import issue
from millrace.sources.event_log import Accepted, Completed, EventLog, Feedback
from millrace.sources.feedback import land_events, refine_feedback
from millrace.sources.ingest import land_documents, refine_documents
from millrace.sources.pseudonym import pseudonym
from millrace.sources.questions import derive_questions

START = datetime(2026, 11, 23, 8, tzinfo=UTC)
TOLD = (
    "mail me at ann.lee@example.org",
    "call +44 20 7946 0958 or (415) 555-2671",
    "my card 4111 1111 1111 1111 was charged twice",
    "it says 203.0.113.7 is blocked, and 2001:db8::8a2e:370:7334",
)
"""What users wrote beside their questions."""
SECRETS = (
    "ann.lee@example.org", "7946 0958", "555-2671", "4111 1111", "203.0.113.7", "2001:db8",
)  # fmt: skip


def prod_of(settings: Settings) -> Settings:
    """Prod in the same lake, with keys of its own, and no Spark server."""
    keys = {name: SecretStr(f"prod's {name}") for name in ("completion_key", "pseudonym_key")}
    return settings.model_copy(update={"environment": "prod", "spark_tables": frozenset()} | keys)


def fill_prod(settings: Settings, application: Application, *, users: int = 200) -> Settings:
    """Prod of the same lake, with documents, a frozen evaluation set, and `users` who each ask once: two thirds of
    them rate, every second rating is bad, and every fourth user tells who they are."""
    prod = prod_of(settings)
    land_documents(prod, application, run="prod")
    refine_documents(prod, application, run="prod")
    refresh_chunks(prod, application, run="prod")
    freeze_evaluation_set(prod, application, run="prod")
    ask(prod, application, users=users)
    return prod


def publish(prod: Settings, application: Application) -> dict[str, dict[str, Any]]:
    """What the DAG `publish_sample` does; by stage, what it told."""
    return {
        stage.__name__: stage(prod, application, run="prod")
        for stage in (publish_evaluation_sets, publish_documents, publish_exchanges)
    }


def ask(prod: Settings, application: Application, *, users: int, start: datetime = START) -> None:
    lake = Lake.of(prod, application.name)
    documents = lake.read(SILVER_DOCUMENTS)
    chunks = lake.read(SILVER_CHUNKS, ["document_id", "chunk_id"]).to_pylist()
    known = [one for one in derive_questions(documents, application) if one.split != "evaluation"]
    key = prod.completion_key.get_secret_value().encode()
    at = start
    log = EventLog(prod.event_log(application.name), clock=lambda: at)
    for number in range(users):
        at = start + timedelta(seconds=number)
        asked = known[number % len(known)]
        told = f" ({TOLD[number // 4 % len(TOLD)]})" if number % 4 == 0 else ""
        about = {
            "completion_id": issue(key, application.name, at),
            "application": application.name,
            "simulated": True,
            "user": pseudonym(prod.pseudonym_key.get_secret_value().encode(), f"user {number}"),
            "question": f"{asked.question}{told}",
            "release_id": "rel-0123456789abcdef",
            "release_version": "1",
            "index_build": "build-of-prod",
            "prompt_version": f"{application.name}.prompt/1",
            "rollout_id": "rollout-1",
            "epoch": 1,
            "arm": "champion",
            "assignment_probability": 0.25,
            "pinned": False,
            "accepted_at": at,
        }
        bad = number % 6 < 2
        log.append(Accepted(**about))
        log.append(
            Completed(
                **about,
                answer="I do not know." if bad else asked.answer,
                citations=tuple(one["chunk_id"] for one in chunks if one["document_id"] == asked.document_id),
                prompt_tokens=300,
                completion_tokens=8,
                seconds=0.5,
                cost_usd=0.0001,
                from_cache=False,
                fell_back=False,
            )
        )
        if number % 3 != 2:
            ids = {name: about[name] for name in ("completion_id", "application", "simulated", "user")}
            comment = f"wrong{told}" if bad else None
            log.append(
                Feedback(**ids, rating=0.0 if bad else 1.0, comment=comment, correction=asked.answer if bad else None)
            )
    log.close()
    interval = (start, start + timedelta(hours=1))
    land_events(prod, application, *interval, run="prod")
    refine_feedback(prod, application, *interval, run="prod")
