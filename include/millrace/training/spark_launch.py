"""Starts the training program's processes on a Spark cluster: one barrier stage, a task a process.

`SPARK_REMOTE=sc://… python -m millrace.training.spark_launch spec.json`, as `launch.py` does. Spark's own
`DeepspeedTorchDistributor` runs torchrun in each task; the tasks need the project installed and the spec's paths. They
hold no pipe to this process, so they watch a file that it touches: when it is gone, they end.
"""

import os
import sys
import threading
import time
import uuid
from pathlib import Path

from millrace.training import program
from millrace.training.spec import read_spec

BEAT_SECONDS = 1.0


def main() -> None:
    """Returns when every process has ended well; what goes wrong is raised as Spark says it."""
    path = Path(sys.argv[1])
    spec = read_spec(path)
    threading.Thread(target=program.die_with_launcher, daemon=True).start()
    _wait_for_those_before(spec.folder)
    heartbeat = spec.folder / f"heartbeat-{uuid.uuid4().hex}"
    heartbeat.touch()
    threading.Thread(target=_beat, args=[heartbeat], daemon=True).start()
    from pyspark.ml.deepspeed.deepspeed_distributor import DeepspeedTorchDistributor
    from pyspark.sql import SparkSession

    session = SparkSession.builder.remote(os.environ["SPARK_REMOTE"]).getOrCreate()
    distributor = DeepspeedTorchDistributor(
        numGpus=spec.processes,
        localMode=False,
        # A cluster whose tasks are given GPUs has them.
        useGpu=int(session.conf.get("spark.task.resource.gpu.amount", "0") or 0) > 0,
        deepspeedConfig=spec.deepspeed_config(total_steps=1).model_dump(mode="json", exclude_none=True),
    )
    try:
        distributor.run(program.__file__, "--spec", str(path), "--heartbeat", str(heartbeat))
    finally:
        heartbeat.unlink()


def _wait_for_those_before(folder: Path) -> None:
    """Processes of a launcher that was killed live on until they miss it: two at work in one folder would mix."""
    left = [(file, time.time() - file.stat().st_mtime) for file in folder.glob("heartbeat-*")]
    for file, _ in left:
        file.unlink()
    if any(age < 2 * program.HEARTBEAT_SECONDS for _, age in left):
        print(f"waiting {program.HEARTBEAT_SECONDS} s for the processes of an attempt that was killed", flush=True)
        time.sleep(program.HEARTBEAT_SECONDS + BEAT_SECONDS)


def _beat(heartbeat: Path) -> None:
    while heartbeat.exists():
        heartbeat.touch()
        time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    main()
