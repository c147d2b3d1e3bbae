"""A release with the same weights in fewer bits, as a candidate: what it costs is measured here, what it answers by
the gate.
"""

import logging
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millrace.applications import Application
from millrace.errors import TrainingError
from millrace.lakehouse.costs import Cost, cost_id, record_cost
from millrace.lakehouse.lake import Lake
from millrace.releases.manifest import Manifest, Weights, describe_weights
from millrace.releases.package import read_release
from millrace.releases.registry import (
    fetch_release,
    find_version,
    local_releases,
    register_once,
    training_tags,
)
from millrace.scoring.overlap import token_f1
from millrace.settings import Settings
from millrace.training.measure import PROBE_TOKENS, PROBES, Measured, as_tags, measure, side_by_side
from millrace.training.quantise import in_format, known_format, quantised_name, saved_bytes, write_quantised
from millrace.training.starting import required_champion

log = logging.getLogger("millrace.training")

AGREEMENT = 0.3
"""Mean token-F1 between the answers before and after. Fewer bits change words, a tensor written wrongly leaves nothing
in common; whether the answers are good enough is the gate's to say."""

MIB = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """The same probes, answered by the model before and after."""

    before: Measured
    after: Measured
    agreement: float


def compress_release(
    settings: Settings, application: Application, *, format_name: str, run: str, version: str | None = None
) -> dict[str, Any]:
    """Register a release with its weights in another, smaller format as a candidate.

    Args:
        format_name: one of `quantise.FORMATS`.
        version: of the release; None: the champion.

    Returns:
        `version` (None: there is none), `release_id`, `changed`, `why`; where it is new, also `agreement`, and
        `bytes`, `resident_mib` and `tokens_per_second`, each with `_before`.

    Raises:
        TrainingError: such a format can't be had, a server computes this release, or the result doesn't answer like
            the model or costs as much memory.
        EngineError: the result can't be loaded.
        ReleaseError: there is no such release, or MLflow doesn't answer.
        SettingsError: the declaration has no price for the result.
    """
    known_format(format_name)
    result = _compress(settings, application, version or required_champion(settings, application), format_name, run)
    log.info("%s", result["why"])
    return result


def compare_models(before: Path, after: Path, *, threads: int) -> Comparison:
    """Load both model files, one after the other, each in a process of its own, and ask them the probes.

    Raises:
        EngineError: one can't be loaded.
        TrainingError: they have too little in common, or memory shrinks by less than half of what the file does.
    """
    ours, theirs = (
        measure(path, PROBES, max_new_tokens=PROBE_TOKENS, alone=len(PROBES), threads=threads)
        for path in (before, after)
    )
    agreement = agreement_of(ours.answers, theirs.answers)
    if agreement < AGREEMENT:
        raise TrainingError(
            f"{after.name} agrees with {before.name} only to {agreement:.2f} (token-F1, at least {AGREEMENT}): it "
            f"answers {theirs.answers[0]!r} where {ours.answers[0]!r} was said; it is not used"
        )
    saved = (before.stat().st_size - after.stat().st_size) / MIB
    if ours.resident_mib - theirs.resident_mib < saved / 2:
        raise TrainingError(
            f"{after.name} is {saved:.0f} MiB smaller than {before.name}, but takes {theirs.resident_mib:.0f} MiB of "
            f"memory where that takes {ours.resident_mib:.0f}: the engine converts the format when it loads it; choose "
            "another"
        )
    return Comparison(ours, theirs, agreement)


def agreement_of(before: Sequence[str], after: Sequence[str]) -> float:
    """Mean token-F1 of answers to the same prompts."""
    return float(np.mean([token_f1(theirs, ours) for ours, theirs in zip(before, after, strict=True)]))


def _compress(settings: Settings, application: Application, version: str, format_name: str, run: str) -> dict[str, Any]:
    folder = fetch_release(settings, application, version)
    manifest = read_release(folder)
    generator = manifest.generator
    if not isinstance(generator, Weights):
        raise TrainingError(
            f"release {application.name}@{version} is computed by a server, which has the weights of {generator.name}; "
            "quantise them there"
        )
    source = folder / generator.name
    if in_format(source, format_name):
        return _unchanged(f"release {version} is in {format_name} already")
    saved = saved_bytes(source, format_name)
    if saved <= 0:
        return _unchanged(
            f"release {version} has {_megabytes(generator.bytes)} now, {_megabytes(generator.bytes - saved)} in "
            f"{format_name}: nothing is gained"
        )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".quantise-", dir=local_releases(settings)) as scratch:
        target = Path(scratch) / quantised_name(generator.name, format_name)
        write_quantised(source, target, format_name)
        smaller = manifest.changed(generator=describe_weights(target))
        application.prices.of(smaller.generator.name)  # refused here rather than when it is loaded to answer
        known = find_version(settings, application, smaller.release_id)
        if known:
            return _unchanged(f"release {version} in {format_name} is version {known} already", known, smaller)
        compared = compare_models(source, target, threads=settings.threads)
        told = _told(source, target, compared)
        _record_cost(settings, application, version, format_name, smaller, time.perf_counter() - started, run)
        registered = register_once(
            settings,
            application,
            smaller,
            target.parent,
            run=run,
            tags=training_tags(settings, application, version)
            | {"millrace.origin": "quantise", "quantised_from": version, "format": format_name}
            | as_tags(told),
        )
    return registered | told | {"why": _sentence(version, format_name, told)}


def _told(source: Path, target: Path, compared: Comparison) -> dict[str, Any]:
    return {"agreement": compared.agreement} | side_by_side((source, compared.before), (target, compared.after))


def _sentence(version: str, format_name: str, told: dict[str, Any]) -> str:
    return (
        f"release {version} in {format_name}: {_megabytes(told['bytes_before'])} → {_megabytes(told['bytes'])}, memory "
        f"{told['resident_mib_before']:.0f} → {told['resident_mib']:.0f} MiB, {told['tokens_per_second_before']:.0f} → "
        f"{told['tokens_per_second']:.0f} tokens/s; its answers agree to {told['agreement']:.2f} (token-F1)"
    )


def _record_cost(
    settings: Settings,
    application: Application,
    version: str,
    format_name: str,
    smaller: Manifest,
    seconds: float,
    run: str,
) -> None:
    subject = f"{version} in {format_name}"
    cost = Cost(
        cost_id("training", subject, uuid.uuid4().hex),
        "training",
        subject,
        seconds=seconds,
        tokens=0,
        cost_usd=application.prices.machine("training", seconds),
        release_id=smaller.release_id,
    )
    record_cost(Lake.of(settings, application.name), cost, run=run)


def _unchanged(why: str, version: str | None = None, smaller: Manifest | None = None) -> dict[str, Any]:
    return {"version": version, "release_id": smaller.release_id if smaller else None, "changed": False, "why": why}


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
