"""A release goes to the next environment: dev → staging → prod, by a person's approval, in one of two ways.

`models` copies it as it is (`transfer.py`); `code` has the stage that made it make another one here, of this
environment's data, by the same commit and the same declaration. Which one is the declaration's choice
(`[promotion.<environment>]`). Either way the result is a candidate as any other: this environment's gate asks it, and
its rollout decides. Every step is a row of `ops/promotions`, and an entry of the audit trail.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from millrace.applications import Application
from millrace.environments.transfer import COPIED_TAG, copy_release, evaluations, find_release
from millrace.errors import ApprovalError, ReleaseError
from millrace.lakehouse.audit.chain import PERSON
from millrace.lakehouse.audit.journals import follow
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.promotions import Promotion, Step, Way, note_step, read_steps
from millrace.lakehouse.trained import TRAINED_TAGS
from millrace.releases.approval import read_answer
from millrace.releases.recipe import CHANGED, COMMIT_TAG, Recipe, read_recipe, running_commit
from millrace.releases.registry import BUILDER_TAG, RELEASE_TAG
from millrace.settings import Settings

log = logging.getLogger("millrace.promotion")

SOURCES = {"staging": "dev", "prod": "staging"}
"""Environment → the one before."""
KINDS = {"finetune": "finetune", "embedding": "embedding", "prompt_study": "prompt"}
"""Origin of a release → its name in `[promotion.<environment>]`; others are copied."""
ACTOR = "promotion"


def request(settings: Settings, application: Application, version: str, *, run_id: str) -> dict[str, Any]:
    """What is to be promoted, for whoever has to approve of it. Nothing is written.

    Args:
        version: in the environment before.
        run_id: of the run that promotes: the same run is the same promotion.

    Returns:
        `promotion` (the fields of `Promotion`), `asks` (the question) and `told`: what a person needs for a decision,
        as Markdown.

    Raises:
        ReleaseError: there is no environment before, or no such release in it; or this environment would make it again
            and can't: it doesn't say how it was made, this code is another commit, or this declaration another one.
    """
    source = SOURCES.get(settings.environment)
    if source is None:
        raise ReleaseError(
            f"nothing is promoted to {settings.environment}, where releases begin; promote in {' or '.join(SOURCES)}"
        )
    origin, tags = find_release(settings, application, version, source=source)
    named = f"{application.name}@{version}"
    way = _way(settings, application, tags)
    promotion = Promotion(
        promotion_id=content_hash(settings.environment, application.name, source, version, run_id)[:12] + _pinned(tags),
        source=source,
        source_version=version,
        release_id=tags[RELEASE_TAG],
        way=way,
        commit=tags.get(COMMIT_TAG),
        recipe=read_recipe(tags, f"{named} of {source}").model_dump_json() if way == "code" else None,
    )
    _require_makeable(settings, application, promotion)
    return {
        "promotion": asdict(promotion),
        "asks": f"May {named} of {source} come into {settings.environment}?",
        "told": _told(settings, origin, application, promotion, tags),
    }


def record_answer(
    settings: Settings, application: Application, asked: Mapping[str, Any], answer: Mapping[str, Any]
) -> None:
    """Write a person's answer into the journal, unless it has the same.

    Args:
        asked: the `promotion` that `request` returned.
        answer: as `read_answer` takes it.

    Raises:
        ApprovalError: nobody is named, no reason is given, who answered built the release, or somebody answered
            otherwise before.
        ReleaseError: who built it, or what it was trained on, is another than when it was asked about.
    """
    promotion = Promotion(**asked)
    _, tags = find_release(settings, application, promotion.source_version, source=promotion.source)
    _require_as_asked(promotion, tags)
    said = read_answer(
        settings,
        application.name,
        answer,
        builder=tags.get(BUILDER_TAG),
        resource=f"promotion/{promotion.promotion_id}",
        about=f"version {promotion.source_version} of {application.name} in {promotion.source}",
    )
    if not said.reason.strip():
        raise ApprovalError(f"{said.actor} gave no reason; clear the task `approve`, and answer with one")
    lake, run = Lake.of(settings, application.name), f"{PERSON}{said.actor}"
    step: Step = "approved" if said.approved else "rejected"
    steps = read_steps(lake, promotion.promotion_id)
    other = steps.get("rejected" if said.approved else "approved")
    if other is not None:
        told = f"{other['actor']} answered otherwise about promotion {promotion.promotion_id} before"
        raise ApprovalError(f"{told}; start another promotion")
    note_step(lake, promotion, step, actor=said.actor, reason=said.reason, run=run)
    follow(settings, application.name, run=run)


def bring(settings: Settings, application: Application, asked: Mapping[str, Any], *, run: str) -> dict[str, Any]:
    """Copy the release, or say which run makes it again. Killed anywhere, the next call does the rest.

    Args:
        asked: the `promotion` that `request` returned.

    Returns:
        `why`, `changed` (whether a candidate was registered now), `version` (here; None: no candidate yet),
        `release_id` (of what was promoted), `rebuild`: the run to start, if one is, in a list: `trigger_dag_id`,
        `trigger_run_id`, `conf`.

    Raises:
        ApprovalError: this environment asks a person, and nobody has answered, or about something else.
        ReleaseError: as `request` and `copy_release`.
    """
    promotion, lake = Promotion(**asked), Lake.of(settings, application.name)
    steps = read_steps(lake, promotion.promotion_id)
    brought: dict[str, Any] = {"changed": False, "version": None, "release_id": promotion.release_id, "rebuild": []}
    if "rejected" in steps:
        return brought | {"why": f"{steps['rejected']['actor']} rejected it"}
    if settings.environment in application.promotion.approval_in and "approved" not in steps:
        raise ApprovalError(
            f"nobody approved of promotion {promotion.promotion_id}, and {settings.environment} asks for that; clear "
            "the task `approve`, and let somebody answer"
        )
    if approved := steps.get("approved"):
        other = [name for name, value in asdict(promotion).items() if approved[name] != value]
        if other:
            raise ApprovalError(
                f"{approved['actor']} approved of another {', '.join(other)} than promotion {promotion.promotion_id} "
                "has now; start another promotion"
            )
    if promotion.recipe is None:
        version, source = promotion.source_version, promotion.source
        copied = copy_release(
            settings,
            application,
            version,
            source=source,
            run=run,
            approved=promotion.release_id,
            agreed=partial(_require_as_asked, promotion),
        )
        why = f"copied with {copied['evaluations']} evaluations"
        note_step(lake, promotion, "copied", actor=ACTOR, reason=why, run=run, version=copied["version"])
        brought |= {"changed": copied["changed"], "version": copied["version"]}
    else:
        _require_makeable(settings, application, promotion)
        recipe = Recipe.model_validate_json(promotion.recipe)
        why = f"{application.name}.{recipe.stage} makes it again of the data of {settings.environment}"
        note_step(lake, promotion, "rebuilding", actor=ACTOR, reason=why, run=run)
        brought["rebuild"] = [
            {
                "trigger_dag_id": f"{application.name}.{recipe.stage}",
                "trigger_run_id": f"promotion__{promotion.promotion_id}",
                "conf": recipe.form,
            }
        ]
    follow(settings, application.name, run=run)
    log.info("%s@%s of %s: %s", application.name, promotion.source_version, promotion.source, why)
    return brought | {"why": why}


def copy_by_hand(
    settings: Settings, application: Application, version: str, *, source: str, actor: str
) -> dict[str, Any]:
    """`copy_release` by a person who has this environment's credential and asks nobody; in the journal with the name.

    Raises:
        ReleaseError: as `copy_release`.
    """
    _, tags = find_release(settings, application, version, source=source)
    copied = copy_release(settings, application, version, source=source, run=f"millrace release copy by {actor}")
    promotion = Promotion(
        # With the release's: under a version's number there may be another one later.
        promotion_id=content_hash(
            "by hand", settings.environment, application.name, source, version, copied["release_id"]
        )[:12],
        source=source,
        source_version=version,
        release_id=copied["release_id"],
        way="models",
        commit=tags.get(COMMIT_TAG),
    )
    run = f"{PERSON}{actor}"
    lake = Lake.of(settings, application.name)
    note_step(lake, promotion, "copied", actor=actor, reason="by hand", run=run, version=copied["version"])
    follow(settings, application.name, run=run)
    return copied


def _way(settings: Settings, application: Application, tags: Mapping[str, str]) -> Way:
    kind = KINDS.get(tags.get("millrace.origin", ""))
    way: Way = getattr(getattr(application.promotion, settings.environment), kind) if kind else "models"
    return way


def _pinned(tags: Mapping[str, str]) -> str:
    """The end of a promotion's id: of what is asked and looked for by tags, which the release's own id doesn't hold and
    whoever writes the other environment can change."""
    said = (tags.get(name, "") for name in (BUILDER_TAG, *TRAINED_TAGS))
    return content_hash(*said)[:8]


def _require_as_asked(promotion: Promotion, tags: Mapping[str, str]) -> None:
    """Raises:
    ReleaseError: who built the release, or what it was trained on, is another than when it was asked about.
    """
    if not promotion.promotion_id.endswith(_pinned(tags)):
        raise ReleaseError(
            f"who built version {promotion.source_version} of {promotion.source}, or what it was trained on, is told "
            "otherwise than when it was asked about; promote it again, and find out who changed its tags"
        )


def _require_makeable(settings: Settings, application: Application, promotion: Promotion) -> None:
    """Raises:
    ReleaseError: it is to be made again, and nothing here makes the same.
    """
    if promotion.recipe is None:
        return
    here = settings.environment
    named = f"{application.name}@{promotion.source_version} of {promotion.source}"
    recipe = Recipe.model_validate_json(promotion.recipe)
    if promotion.commit is None or promotion.commit.endswith(CHANGED):
        made = "doesn't say which commit made it" if promotion.commit is None else "was made by code that no commit has"
        raise ReleaseError(
            f"{named} {made}, so {here} can't make it again; commit the code, and train it again in {promotion.source}"
        )
    running = running_commit(settings)
    if running != promotion.commit:
        raise ReleaseError(
            f"{here} runs commit {running or '(unknown)'}, and {named} was made by {promotion.commit}; deploy that "
            f"commit to {here}, then promote again"
        )
    if others := recipe.differences(application):
        raise ReleaseError(
            f"{here} declares {application.name} otherwise than {named} was made: {'; '.join(others)}; declare the "
            "same, or train it again"
        )
    teacher = recipe.form.get("teacher")
    if teacher not in (None, "champion"):
        raise ReleaseError(
            f"{named} learnt the answers of version {teacher} of {promotion.source}, which is another one in {here}; "
            "promote its bytes (`models`), or let it learn from the champion"
        )


def _told(
    settings: Settings, origin: Settings, application: Application, promotion: Promotion, tags: Mapping[str, str]
) -> str:
    its_own, brought = evaluations(origin, application, promotion.source_version, promotion.release_id)
    ways = {
        "models": "Its bytes, what it was trained on and its evaluations are copied",
        "code": f"It is made again of the data of {settings.environment}, by the same commit: `{promotion.recipe}`",
    }
    judged = [f"- {run.info.run_name}, quality {run.data.metrics.get('quality.estimate', 0):+.3f}" for run in its_own]
    return "\n".join(
        [
            f"Release **{application.name}@{promotion.source_version}** of {promotion.source} "
            f"(`{promotion.release_id}`), made by {tags.get('millrace.origin', 'nobody knows what')} at commit "
            f"`{promotion.commit or 'unknown'}`, built by {tags.get(BUILDER_TAG) or 'the schedule'}"
            + (f", before in `{tags[COPIED_TAG]}`." if COPIED_TAG in tags else "."),
            "",
            f"{ways[promotion.way]}; then the gate of {settings.environment} asks it.",
            "",
            f"Evaluations in {promotion.source} ({len(brought)} more came with it):",
            "",
            *(judged or ["- none"]),
        ]
    )
