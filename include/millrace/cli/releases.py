"""`millrace release`, `rollout` and `index`: what answers, what people decide about it, and where it searches."""

import getpass
from pathlib import Path
from typing import Annotated, Any

import typer

from millrace.cli.terminal import ApplicationName, Reason, console, declaration, group, one_sentence
from millrace.settings import read_settings
from millrace.stack import airflow_of

release_app = group("Releases: list, bring one from another environment, let one past the gate, make one smaller.")
rollout_app = group("Rollouts: what people decide by hand, with a reason.")
index_app = group("Index builds: list, and publish the one before again.")


@release_app.command("list")
def release_list(application: ApplicationName = "qa") -> None:
    """Every registered release with its tags."""
    from millrace.releases.registry import versions

    with one_sentence():
        settings, declared = declaration(application)
        for version, tags in versions(settings, declared).items():
            told = ", ".join(f"{key.removeprefix('millrace.')}={value}" for key, value in sorted(tags.items()))
            console.print(f"{version:>4}  {told}", markup=False, soft_wrap=True)


@release_app.command("add")
def release_add(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face directory: safetensors, configuration, tokenizer.")],
    name: Annotated[str | None, typer.Option(help="What to call the model; empty: the folder's name.")] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Have the gate look at it now.")] = False,
    application: ApplicationName = "qa",
) -> None:
    """Register the champion with this model as its generator: a candidate like any other."""
    from millrace.releases.declare import add_model

    with one_sentence():
        settings, declared = declaration(application)
        run = f"millrace release add by {getpass.getuser()}"
        _told(application, add_model(settings, declared, folder, name=name, run=run), evaluate)


@release_app.command("add-chain")
def release_add_chain(
    name: Annotated[str, typer.Argument(help="Of its entry point in group millrace.chains.")],
    parameters: Annotated[Path | None, typer.Option(help="A JSON file: what the chain is made with.")] = None,
    context_tokens: Annotated[int, typer.Option(min=1, help="Prompt and answer together, at most.")] = 4096,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Have the gate look at it now.")] = False,
    application: ApplicationName = "qa",
) -> None:
    """Register the champion with this installed LangChain chain as its generator: a candidate like any other."""
    from millrace.engines.huggingface import read_json
    from millrace.releases.declare import add_chain

    with one_sentence():
        settings, declared = declaration(application)
        run = f"millrace release add-chain by {getpass.getuser()}"
        given = read_json(parameters) if parameters else {}
        added = add_chain(settings, declared, name, parameters=given, context_tokens=context_tokens, run=run)
        _told(application, added, evaluate)


@release_app.command("container")
def release_container(
    version: str,
    folder: Annotated[Path, typer.Argument(help="To write; not there yet.")],
    index_build: Annotated[str | None, typer.Option(help="To answer from; empty: the published one.")] = None,
    application: ApplicationName = "qa",
) -> None:
    """Write a folder to build a container image from: model, index build, code, requirements, Dockerfile."""
    from millrace.releases.container import write_container

    with one_sentence():
        settings, declared = declaration(application)
        manifest = write_container(settings, declared, version, folder, build=index_build)
        console.print(
            f"{folder} holds {manifest.release_id}. With an engine: docker build --tag {application}:"
            f"{manifest.release_id} {folder}\nWithout: python -m millrace.releases.serve {folder}",
            markup=False,
            soft_wrap=True,
        )


@release_app.command("copy")
def release_copy(
    version: str,
    source: Annotated[str, typer.Option("--from", help="Environment that has it: dev, staging or prod.")],
    application: ApplicationName = "qa",
) -> None:
    """Register a release of another environment here as it is, with its evidence: a candidate like any other."""
    from millrace.environments.promotion import copy_by_hand

    with one_sentence():
        settings, declared = declaration(application)
        copied = copy_by_hand(settings, declared, version, source=source, actor=getpass.getuser())
        console.print(
            f"{copied['release_id']} of {source} is {application}@{copied['version']} in {settings.environment}, with "
            f"{copied['evaluations']} evaluations.",
            markup=False,
            soft_wrap=True,
        )
        _told(application, copied, evaluate=False)


@release_app.command("admit")
def release_admit(version: str, reason: Reason, application: ApplicationName = "qa") -> None:
    """Let a registered release roll out whatever the gate says; recorded with your name."""
    _decide("admit", application, reason, version=version)


@release_app.command("withdraw")
def release_withdraw(version: str, reason: Reason, application: ApplicationName = "qa") -> None:
    """No user is given this release any more: its rollout ends, or the champion before is back."""
    from millrace.rollout.people import withdraw

    with one_sentence():
        settings, declared = declaration(application)
        for decision in withdraw(settings, declared, version, actor=getpass.getuser(), reason=reason):
            told = f"{decision.kind}; champion is version {decision.champion}"
            console.print(f"Decision {decision.sequence} of {application}: {told}", markup=False)


@release_app.command("quantise")
def release_quantise(
    version: str,
    format_name: Annotated[str, typer.Option("--format", help="q8_0, q4_1 or q4_0.")] = "q8_0",
    application: ApplicationName = "qa",
) -> None:
    """Register the same release with its weights in fewer bits as a candidate, in this process, as the DAG does."""
    from millrace.training.compress import compress_release

    with one_sentence():
        settings, declared = declaration(application)
        run = f"millrace release quantise by {getpass.getuser()}"
        made = compress_release(settings, declared, format_name=format_name, version=version, run=run)
        console.print(made["why"], markup=False, soft_wrap=True)
        if made["changed"]:
            told = f"Candidate {made['version']} ({made['release_id']}); {application}.evaluate_candidate is next."
            console.print(told, markup=False, soft_wrap=True)


@rollout_app.command("freeze")
def rollout_freeze(reason: Reason, application: ApplicationName = "qa") -> None:
    """The controller decides nothing more until somebody resumes."""
    _decide("freeze", application, reason)


@rollout_app.command("resume")
def rollout_resume(reason: Reason, application: ApplicationName = "qa") -> None:
    """The controller decides again."""
    _decide("resume", application, reason)


@rollout_app.command("skip")
def rollout_skip(reason: Reason, application: ApplicationName = "qa") -> None:
    """The challenger becomes champion now."""
    _decide("skip", application, reason)


@rollout_app.command("back")
def rollout_back(reason: Reason, application: ApplicationName = "qa") -> None:
    """End the rollout; without one, the previous champion is back."""
    _decide("roll_back", application, reason)


LineageName = Annotated[
    str | None, typer.Option("--lineage", help="Of a release's embedding model; empty: of the declared one.")
]


@index_app.command("list")
def index_list(application: ApplicationName = "qa", lineage: LineageName = None) -> None:
    """The index builds of a lineage, newest last, and which is published."""
    from millrace.retrieval.embed import lineage_id
    from millrace.retrieval.index import builds_of

    with one_sentence():
        settings, declared = declaration(application)
        builds = builds_of(settings, declared.name, lineage or lineage_id(declared))
        pointer = builds.published()
        marks = {pointer.build: "published", pointer.previous: "previous"} if pointer else {}
        for manifest in builds.manifests():
            console.print(
                f"{manifest.build}  {manifest.built_at:%Y-%m-%d %H:%M} UTC  {manifest.chunks} chunks of "
                f"{manifest.documents} documents  {marks.get(manifest.build, '')}",
                markup=False,
                soft_wrap=True,
            )
        console.print(f"in {builds.where}", markup=False, style="dim", soft_wrap=True)


@index_app.command("back")
def index_back(application: ApplicationName = "qa", lineage: LineageName = None) -> None:
    """Publish the index build before the published one again; a second time, and that one is back."""
    from millrace.retrieval.index import publish_previous

    with one_sentence():
        settings, declared = declaration(application)
        moved = publish_previous(settings, declared, lineage, actor=getpass.getuser())
        console.print(f"Published {moved.build} of {application}; before it was {moved.previous}.", markup=False)


def _told(application: str, registered: dict[str, Any], evaluate: bool) -> None:
    """What became of a candidate, and its next step."""
    known = "" if registered["changed"] else ", which was registered before"
    console.print(
        f"Candidate {registered['version']} ({registered['release_id']}){known}; {application}.evaluate_candidate is "
        "next.",
        markup=False,
        soft_wrap=True,
    )
    if evaluate:
        with airflow_of(read_settings()) as airflow:
            started = airflow.trigger(f"{application}.evaluate_candidate", {"candidate": registered["version"]})
        console.print(f"Started {started.dag_id}, run {started.run_id}.", markup=False)


def _decide(act: str, application: str, reason: str, **arguments: Any) -> None:
    from millrace.rollout import people

    with one_sentence():
        settings, declared = declaration(application)
        decision = getattr(people, act)(settings, declared, actor=getpass.getuser(), reason=reason, **arguments)
        console.print(
            f"Decision {decision.sequence} of {application}: {decision.kind}, {decision.reason}", markup=False
        )
