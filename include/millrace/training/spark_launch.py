"""Starts the training program's processes on a Spark cluster: one barrier stage, a task a process.

`SPARK_REMOTE=sc://… python -m millrace.training.spark_launch spec.json`, as `launch.py` does. Spark's own
`DeepspeedTorchDistributor` runs torchrun in each task; the tasks need the project installed and the spec's paths. They
hold no pipe to this process, so they watch a file that it touches: when it is gone, they end.
"""

import os
import sys
import threading
import time
from pathlib import Path

from millrace.training import program
from millrace.training.spec import Spec, read_spec

BEAT_SECONDS = 1.0


def main() -> None:
    """Returns when every process has ended well; what goes wrong is raised as Spark says it."""
    path = Path(sys.argv[1])
    spec = read_spec(path)
    spec.heartbeat.touch()
    threading.Thread(target=_beat, args=[spec], daemon=True).start()
    threading.Thread(target=program.die_with_launcher, daemon=True).start()
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
    distributor.run(program.__file__, "--spec", str(path), "--heartbeat", str(spec.heartbeat))


def _beat(spec: Spec) -> None:
    while True:
        spec.heartbeat.touch()
        time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    main()
