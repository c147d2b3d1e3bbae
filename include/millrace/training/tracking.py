"""A fine-tune as an MLflow run: parameters, data, curves. For people; nothing is decided by it."""

from collections.abc import Sequence
from typing import Any

from millrace.releases.mlflow_server import ensure_experiment, mlflow_client
from millrace.settings import Settings

FINGERPRINT_TAG = "millrace.fingerprint"
BATCH = 1000
"""Metrics that MLflow takes in one request."""


class TrackedRun:
    """The one MLflow run of a fine-tune, in experiment `<application>/finetune`; a retry continues it.

    Every method raises ReleaseError if MLflow doesn't answer, or refuses.
    """

    def __init__(self, settings: Settings, application: str, fingerprint: str, tags: dict[str, str]) -> None:
        """Find or create it."""
        self._settings = settings
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

    def start(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        with mlflow_client(self._settings, self._purpose) as client:
            client.update_run(self.run_id, status="RUNNING")
            client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in params.items()])

    def steps(self, lines: Sequence[dict[str, Any]]) -> None:
        """Loss, learning rate and tokens per second of some steps, as the program's progress has them."""
        self._metrics(
            [
                (name, value, line["step"])
                for line in lines
                for name, value in (
                    ("loss", line["loss"]),
                    ("learning_rate", line["learning_rate"]),
                    ("tokens_per_second", line["tokens"] / line["seconds"]),
                )
            ]
        )

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
