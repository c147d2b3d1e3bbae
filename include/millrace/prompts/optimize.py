"""The stage: a study around the champion, its trials in the Lakehouse and in MLflow, its best as a candidate release.

A study is named by a hash of all that it depends on. Asked for again, it goes on behind its last kept trial, or, if
it is finished, is read: nothing is answered twice, and the same best is the same prompt version and release.
"""

import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version as code_version
from typing import Any

from millrace.applications import Application, Optimize
from millrace.errors import PromptError, ReleaseError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.costs import Cost, cost_id, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_DOCUMENTS
from millrace.lakehouse.trained import trained_questions, trained_sets
from millrace.prompts.development import Development, choose_development
from millrace.prompts.space import Point, Space, at, space_of
from millrace.prompts.study import Ask, Outcome, Trial, compare, search
from millrace.prompts.tracking import log_study
from millrace.prompts.trials import Part, keep_trial, read_template, read_trials
from millrace.releases.loader import ReleaseLoader
from millrace.releases.package import read_release
from millrace.releases.pipeline import AnswerPipeline
from millrace.releases.prompt_registry import register_prompt
from millrace.releases.published_split import read_split
from millrace.releases.recipe import Recipe
from millrace.releases.registry import fetch_release, register_once, release_manifest, training_tags, versions
from millrace.retrieval.index import published_build
from millrace.settings import Settings
from millrace.sources.questions import derive_questions

log = logging.getLogger("millrace.prompts")


@dataclass(frozen=True)
class _Plan:
    """A study before it is held."""

    study: str
    champion: str
    space: Space
    questions: Development
    build: str
    optimize: Optimize

    @property
    def about(self) -> Mapping[str, str]:
        return {"champion_release_id": self.space.champion.release_id, "index_build": self.build}


def optimize_prompt(
    settings: Settings,
    application: Application,
    *,
    run: str,
    trials: int | None = None,
    token_budget: int | None = None,
) -> dict[str, Any]:
    """Hold the study that champion, documents and index build give, or go on with it, or find that it was held.

    Args:
        trials: instead of the declared `optimize.trials`; another number is another study.
        token_budget: likewise.

    Returns:
        `verdict` (`better`, `not better`, `nothing`: there is no champion), `why`; unless nothing: `study`,
        `champion`, `index_build`, `trials`, `tokens`, `best` (`trial` and its parameters), `start_token_f1`,
        `best_token_f1`, `estimate`, `low`, `high` (on held-out questions; None where nothing was compared), `seen`
        (questions that the champion was trained on).

    Raises:
        PromptError: too few questions, a template that can't be used, a budget that is too small, or no trial worked.
        EngineError, RetrievalError, ReleaseError: nothing can be answered, or MLflow doesn't answer, at present.
    """
    plan = _plan(settings, application, trials, token_budget)
    if plan is None:
        return {"verdict": "nothing", "why": "there is no champion whose prompt could be optimised"}
    outcome = _hold(settings, application, plan, run)
    result = _result(plan, outcome)
    log_study(settings, application.name, result, outcome, run=run)
    log.info("study %s: %s", plan.study, outcome.why)
    return result


def release_best(
    settings: Settings,
    application: Application,
    *,
    result: dict[str, Any],
    run: str,
    form: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Register the best of a study as a candidate: the champion with this prompt, chunks and generation config.

    Args:
        result: as `optimize_prompt` returns it. Unless its verdict is `better`, nothing is registered.
        form: what it was given beside the declaration; None: nothing.

    Returns:
        `version`, `release_id` (None: nothing is registered), `prompt_version`, `changed`: whether it was registered
        now.

    Raises:
        PromptError: the study's trial is gone.
        ReleaseError: MLflow doesn't answer.
    """
    if result["verdict"] != "better":
        return {"version": None, "release_id": None, "prompt_version": None, "changed": False}
    study, champion = result["study"], result["champion"]
    point = Point(**{name: value for name, value in result["best"].items() if name != "trial"})
    template = read_template(Lake.of(settings, application.name), study, result["best"]["trial"])
    if template is None:
        raise PromptError(
            f"study {study} has no trial {result['best']['trial']} in ops/prompt_trials; run the study again"
        )
    prompt = register_prompt(settings, application, template, run=run)
    folder = fetch_release(settings, application, champion)
    manifest = at(read_release(folder), point, prompt)
    registered = register_once(
        settings,
        application,
        manifest,
        folder,
        run=run,
        tags={"millrace.origin": "prompt_study", "study": study}
        | Recipe.of(application, "optimize_prompt", form or {}).tags
        | training_tags(settings, application, champion),
    )
    return registered | {"prompt_version": prompt.version}


def _plan(settings: Settings, application: Application, trials: int | None, token_budget: int | None) -> _Plan | None:
    split = read_split(settings, application.name)
    if split is None or split.champion is None:
        return None
    lake = Lake.of(settings, application.name)
    changes = {"trials": trials, "token_budget": token_budget}
    optimize = application.optimize.model_copy(update={k: v for k, v in changes.items() if v is not None})
    manifest = release_manifest(settings, application, split.champion)
    build = published_build(settings, application, manifest.retrieval.lineage)
    tags = versions(settings, application).get(split.champion, {})
    questions = choose_development(
        derive_questions(lake.read(SILVER_DOCUMENTS), application),
        {question for one in trained_sets(tags) for question in trained_questions(lake, one)},
        examples=max(optimize.few_shot, default=0),
        search=optimize.questions,
        held_out=optimize.held_out,
    )
    space = space_of(manifest, application.prompt, optimize, questions.examples)
    return _Plan(_study_id(space, questions, build, optimize), split.champion, space, questions, build, optimize)


def _study_id(space: Space, questions: Development, build: str, optimize: Optimize) -> str:
    asked = {
        "space": space.described(),
        "search": [question.question_id for question in questions.search],
        "held_out": [question.question_id for question in questions.held_out],
        "build": build,
        "limits": [optimize.trials, optimize.token_budget, optimize.seed],
        "code": code_version("millrace"),
    }
    return f"study-{content_hash(json.dumps(asked, sort_keys=True))[:16]}"


def _hold(settings: Settings, application: Application, plan: _Plan, run: str) -> Outcome:
    lake = Lake.of(settings, application.name)

    def keeper(part: Part) -> Callable[[Trial], None]:
        def keep(trial: Trial) -> None:
            template = plan.space.template(trial.point)
            record_cost(lake, _cost(application, plan, part, trial), run=run)
            keep_trial(lake, plan.study, part, trial, template=template, about=plan.about, run=run)
            log.info(
                "%s, trial %d (%s): %s, token-F1 %.3f on %d questions, %d tokens%s",
                part,
                trial.number,
                trial.point,
                trial.state,
                trial.mean,
                len(trial.scores),
                trial.tokens,
                f"; {trial.why}" if trial.why else "",
            )

        return keep

    with _Answering(settings, application, plan) as answering:
        tried = search(
            plan.space,
            plan.questions.search,
            plan.optimize,
            answering.prepare,
            list(read_trials(lake, plan.study, "search").values()),
            keeper("search"),
        )
        return compare(
            tried,
            plan.questions.held_out,
            answering.prepare,
            application.gate,
            read_trials(lake, plan.study, "held_out"),
            keeper("held_out"),
            seed=int(plan.study[-8:], 16),
        )


def _cost(application: Application, plan: _Plan, part: Part, trial: Trial) -> Cost:
    """What a trial cost, its answers and the machine: on no release, since most trials become none."""
    model = plan.space.champion.generator.name
    answers = application.prices.answer(model, trial.prompt_tokens, trial.completion_tokens)
    return Cost(
        cost_id("optimisation", plan.study, part, str(trial.number), uuid.uuid4().hex),
        "optimisation",
        plan.study,
        seconds=trial.seconds,
        tokens=trial.tokens,
        cost_usd=answers + application.prices.machine("optimisation", trial.seconds),
    )


class _Answering:
    """The champion's engine and retriever, loaded when the first point is prepared: a finished study needs neither."""

    def __init__(self, settings: Settings, application: Application, plan: _Plan) -> None:
        self._loader = ReleaseLoader(settings, application)
        self._plan = plan

    def __enter__(self) -> "_Answering":
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()

    def prepare(self, point: Point) -> Ask:
        try:
            champion = self._loader.load(self._plan.champion)
        except ReleaseError as error:  # That is no prompt's fault, so no trial may fail of it and be kept.
            raise PromptError(f"champion {self._plan.champion} can't be loaded: {error}") from error
        pipeline = AnswerPipeline(self._plan.space.manifest(point), champion.engine, champion.retriever)
        return lambda question: pipeline.answer(question, build=self._plan.build)


def _result(plan: _Plan, outcome: Outcome) -> dict[str, Any]:
    sheets = [sheet for sheet in (outcome.start_held_out, outcome.best_held_out) if sheet is not None]
    difference = outcome.difference
    return {
        "verdict": "better" if outcome.better else "not better",
        "why": outcome.why,
        "study": plan.study,
        "champion": plan.champion,
        "index_build": plan.build,
        "trials": len(outcome.trials),
        "tokens": sum(trial.tokens for trial in (*outcome.trials, *sheets)),
        "best": {"trial": outcome.best.number, **asdict(outcome.best.point)},
        "start_token_f1": outcome.start_held_out.mean if outcome.start_held_out else None,
        "best_token_f1": outcome.best_held_out.mean if outcome.best_held_out else None,
        "estimate": difference.estimate if difference else None,
        "low": difference.low if difference else None,
        "high": difference.high if difference else None,
        "seen": plan.questions.seen,
    }
