"""A fine-tune as an MLflow run: parameters, data, curves. For people; nothing is decided by it."""

import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from millrace.errors import TrainingError
from millrace.settings import Settings

FINGERPRINT_TAG = "millrace.fingerprint"
BATCH = 1000
"""Metrics that MLflow takes in one request."""


class TrackedRun:
    """The one MLflow run of a fine-tune; a retry continues it."""

    def __init__(self, settings: Settings, application: str, fingerprint: str, tags: dict[str, str]) -> None:
        """Find or create it in experiment `<application>/finetune`.

        Raises:
            TrainingError: MLflow doesn't answer.
        """
        from mlflow import MlflowClient

        self._url = settings.mlflow_url
        _require_server(self._url)
        self._client = MlflowClient(self._url)
        with self._told():
            experiment = self._experiment(f"{application}/finetune")
            found = self._client.search_runs([experiment], f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'", max_results=1)
            self.run_id: str = (
                found[0].info.run_id
                if found
                else self._client.create_run(
                    experiment, tags=tags | {FINGERPRINT_TAG: fingerprint}, run_name=f"finetune {fingerprint}"
                ).info.run_id
            )
            self._client.update_run(self.run_id, status="RUNNING")

    def params(self, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        with self._told():
            self._client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in values.items()])

    def steps(self, lines: Sequence[dict[str, Any]]) -> None:
        """Loss, learning rate and tokens per second of some steps."""
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
        with self._told():
            self._client.set_terminated(self.run_id)

    def fail(self, reason: str) -> None:
        with self._told():
            self._client.set_tag(self.run_id, "failure", reason[:5000])
            self._client.set_terminated(self.run_id, "FAILED")

    def _metrics(self, values: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [Metric(name, float(value), now, step) for name, value, step in values]
        with self._told():
            for start in range(0, len(metrics), BATCH):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:  # else another run created it in between
                    raise
        return str(found.experiment_id)

    @contextmanager
    def _told(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            raise TrainingError(
                f"MLflow at {self._url} did not take the fine-tune's run: {error}; is it up (`millrace status`)? "
                "What was trained is kept, run the task again"
            ) from None


def _require_server(url: str) -> None:
    """MLflow's client alone takes more than four minutes to say that nobody answers."""
    if not url.startswith("http"):
        return
    try:
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
    except (urllib.error.URLError, TimeoutError) as error:
        raise TrainingError(
            f"MLflow at {url} doesn't answer ({error}); is it up (`millrace status`)? Then run the task again"
        ) from None
