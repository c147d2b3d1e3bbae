"""What every DAG file of Millrace shares: defaults, assets by table, the name of a run, and the alert notifier.

Airflow puts the plugins folder on the import path, so DAG files import this module by its name.
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, BaseNotifier, get_current_context

HEAVY = "heavy"
"""One-slot pool of the tasks that fill the machine: embedding, training, evaluation."""


def asset(application: str, path: str) -> Asset:
    """The asset of a table (`silver/chunks`), of the index (`index`) or of the registry (`releases`)."""
    return Asset(name=f"{application}/{path}", uri=f"millrace://{application}/{path}")


def run_name() -> str:
    """Who writes, for provenance: DAG, run and task of the running task."""
    context = get_current_context()
    return f"{context['dag'].dag_id}/{context['run_id']}/{context['ti'].task_id}"


class AlertNotifier(BaseNotifier):
    """Sends a failed task to the place that alerts go to: the log, and the webhook if one is set."""

    template_fields = ("title",)

    def __init__(self, title: str = "{{ dag.dag_id }}.{{ ti.task_id }} failed") -> None:
        super().__init__()
        self.title = title

    def notify(self, context: Any) -> None:
        from millrace.alerts import Alert, send
        from millrace.settings import read_settings

        send(
            Alert(
                title=self.title,
                what=str(context.get("exception") or "no reason was given"),
                source=f"{context['dag'].dag_id}/{context['run_id']}",
                runbook=f"{read_settings().airflow_url}/dags/{context['dag'].dag_id}",
            ),
            read_settings(),
        )


def defaults(owner: str) -> dict[str, Any]:
    """`default_args` of every DAG: two retries with growing waits, and an alert when they are used up."""
    return {
        "owner": owner,
        "retries": 2,
        "retry_delay": timedelta(seconds=15),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=10),
        "on_failure_callback": [AlertNotifier()],
    }
