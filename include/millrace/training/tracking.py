"""A fine-tune as an MLflow run: parameters, data, curves. For people; nothing is decided by it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millrace.releases.mlflow_server import ensure_experiment, mlflow_client
from millrace.settings import PACKAGE, Settings

FINGERPRINT_TAG = "millrace.fingerprint"
BATCH = 1000
"""Metrics that MLflow takes in one request."""


@dataclass(frozen=True)
class TrainedOn:
    """The data of a fine-tune, for MLflow's dataset inputs."""

    name: str
    """Of the table, `layer/name`."""
    digest: str
    """The id of the set, which is the hash of its examples."""
    uri: str
    version: int | None
    """Of the table when it was read."""


class TrackedRun:
    """The one MLflow run of a fine-tune, in experiment `<application>/finetune`; a retry continues it.

    Every method raises ReleaseError if MLflow doesn't answer, or refuses.
    """

    def __init__(self, settings: Settings, application: str, fingerprint: str, tags: dict[str, str]) -> None:
        """Find or create it."""
        self._settings = settings
        self._monitor: Any = None
        self._purpose = f"track fine-tune {fingerprint} of {application}"
        with mlflow_client(settings, self._purpose) as client:
            experiment = ensure_experiment(client, f"{application}/finetune")
            found = client.search_runs([experiment], f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'", max_results=1)
            run = (
                found[0]
                if found
                else client.create_run(
                    experiment, tags=tags | {FINGERPRINT_TAG: fingerprint}, run_name=f"finetune {fingerprint}"
                )
            )
        self.run_id: str = run.info.run_id
        self.finished: bool = run.info.status == "FINISHED"

    def start(self, params: dict[str, Any], data: TrainedOn) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
        from mlflow.utils.git_utils import get_git_commit
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_GIT_COMMIT

        source = json.dumps({"path": data.uri, "delta_table_version": data.version})
        dataset = Dataset(data.name, data.digest, "delta_table", source)
        commit = get_git_commit(str(PACKAGE))
        with mlflow_client(self._settings, self._purpose) as client:
            client.update_run(self.run_id, status="RUNNING")
            client.log_batch(
                self.run_id,
                params=[Param(name, str(value)) for name, value in params.items()],
                tags=[RunTag(MLFLOW_GIT_COMMIT, commit)] if commit else [],
            )
            client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])])

    def machine(self, step: int) -> None:
        """What MLflow's own monitors say of this machine now (`system/…`: processor, memory, disk, network, GPUs).

        Not their thread, which falls silent for good when MLflow is away once.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self._monitor is None:
            self._monitor = SystemMetricsMonitor(self.run_id, tracking_uri=self._settings.mlflow_url)
        self._monitor.collect_metrics()
        found = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        self._metrics([(f"system/{name}", value, step) for name, value in found.items()])

    def steps(self, lines: Sequence[dict[str, Any]]) -> None:
        """Loss, learning rate, tokens per second and the development split's loss of some steps, as the program's
        progress has them."""
        curves = ("loss", "learning_rate", "tokens_per_second", "development_loss")
        shown = [line | {"tokens_per_second": line["tokens"] / line["seconds"]} for line in lines]
        self._metrics([(name, line[name], line["step"]) for line in shown for name in curves if name in line])

    def finish(self, values: dict[str, float]) -> None:
        self._metrics([(name, value, 0) for name, value in values.items()])
        with mlflow_client(self._settings, self._purpose) as client:
            client.set_terminated(self.run_id)

    def fail(self, reason: str) -> None:
        with mlflow_client(self._settings, self._purpose) as client:
            client.set_tag(self.run_id, "failure", reason[:5000])
            client.set_terminated(self.run_id, "FAILED")

    def _metrics(self, values: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [Metric(name, float(value), now, step) for name, value, step in values]
        with mlflow_client(self._settings, self._purpose) as client:
            for start in range(0, len(metrics), BATCH):
                client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])
