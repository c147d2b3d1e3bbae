"""Who starts the program, and what it does about who started it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from millrace.errors import TrainingError
from millrace.training import program, spark_launch
from millrace.training.launch import run_program
from millrace.training.loop import require_fitting
from millrace.training.program import require_same_config
from millrace.training.spec import Spec


@pytest.mark.slow
def test_a_configuration_that_is_not_the_specs_is_refused(make_spec: Callable[..., Spec], tmp_path: Path) -> None:
    spec = make_spec()
    given = tmp_path / "config.json"
    config = spec.deepspeed_config(1).model_dump(mode="json", exclude_none=True)
    given.write_text(json.dumps(config))
    require_same_config(spec, given)
    given.write_text(json.dumps(config | {"gradient_clipping": 2}))
    with pytest.raises(TrainingError, match="isn't the one that the spec makes"):
        require_same_config(spec, given)
    given.write_text("{")
    with pytest.raises(TrainingError, match="can't be read"):
        require_same_config(spec, given)


@pytest.mark.model
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(make_spec: Callable[..., Spec]) -> None:
    from millrace.engines.tokenizer import model_tokenizer

    tokenizer = model_tokenizer(make_spec().base)
    require_fitting(tokenizer, len(tokenizer))
    with pytest.raises(TrainingError, match="it has 1024 tokens, the model 1000"):
        require_fitting(tokenizer, 1000)


@pytest.mark.model
def test_the_program_ends_when_nobody_touches_its_heartbeat_any_more(make_spec: Callable[..., Spec]) -> None:
    spec = make_spec()
    wait = (
        "import sys, time, threading; from pathlib import Path; from millrace.training import program; "
        "program.HEARTBEAT_SECONDS = 3; program._die_without(Path(sys.argv[1]))"
    )
    heartbeat = spec.folder / "heartbeat-1"
    heartbeat.touch()
    process = subprocess.Popen([sys.executable, "-c", wait, str(heartbeat)])
    end = time.monotonic() + 8
    while time.monotonic() < end:
        assert process.poll() is None
        os.utime(heartbeat)
        time.sleep(0.5)
    assert process.wait(20) == 3


def test_a_new_launcher_waits_until_the_processes_of_a_killed_one_have_missed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(spark_launch.time, "sleep", waited.append)
    spark_launch._wait_for_those_before(tmp_path)
    left, long_gone = tmp_path / "heartbeat-1", tmp_path / "heartbeat-2"
    long_gone.touch()
    os.utime(long_gone, (0, 0))
    spark_launch._wait_for_those_before(tmp_path)
    assert waited == []
    left.touch()
    spark_launch._wait_for_those_before(tmp_path)
    assert not list(tmp_path.iterdir()), "who watches one of these ends"
    assert waited == [pytest.approx(program.HEARTBEAT_SECONDS, abs=5)]


@pytest.mark.long  # a JVM, and two processes that load the model beside it
@pytest.mark.model
@pytest.mark.spark
@pytest.mark.timeout(900)
def test_spark_starts_the_same_run(make_spec: Callable[..., Spec], spark_url: str) -> None:
    def train(spec: Spec, **options: Any) -> list[float]:
        run_program(spec, threads=2, watch=lambda: None, **options)
        return [json.loads(line)["loss"] for line in spec.progress.read_text().splitlines()]

    usual, spark = make_spec("usual"), make_spec("spark")
    expected = train(usual, launcher="local")
    assert train(spark, launcher="spark", spark=spark_url) == pytest.approx(expected, rel=1e-4)
    for name, values in load_file(usual.adapter / "adapter_model.safetensors").items():
        np.testing.assert_allclose(load_file(spark.adapter / "adapter_model.safetensors")[name], values, atol=1e-5)
    with pytest.raises(TrainingError, match="the loss was"):
        train(make_spec("broken", learning_rate=1e30), launcher="spark", spark=spark_url)
