"""What every DAG file of Millrace shares: the shape of a stage, assets by table, the name of a run, and alerts.

Airflow puts the plugins folder on the import path, so DAG files import this module by its name.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import (
    DAG,
    Asset,
    AssetAlias,
    BaseNotifier,
    DeadlineAlert,
    DeadlineReference,
    Param,
    SyncCallback,
    get_current_context,
    task,
)
from airflow.sdk.exceptions import AirflowFailException, TaskAwaitingInput
from airflow.utils.types import DagRunType

from millrace.applications import Application
from millrace.settings import read_settings

START = datetime(2026, 1, 1, tzinfo=UTC)
"""Of schedules: no interval before it is run, and none is caught up."""
HEAVY = "heavy"
"""One-slot pool of the tasks that fill the machine: embedding, training, evaluation. Their queue is called so too: an
executor with queues (Celery's) gives them to workers on machines of their own, others pass over it."""
NO_BACKFILL = {"allowed_run_types": frozenset(DagRunType) - {DagRunType.BACKFILL_JOB}}
"""Option of a stage whose every run works on what is there now: Airflow refuses a backfill of it, which would do one
thing many times, and beside one another: a backfill passes over `max_active_runs`."""


def asset(application: str, path: str) -> Asset:
    """The asset of a table (`silver/chunks`), of the index (`index`) or of the registry (`releases`)."""
    return Asset(name=f"{application}/{path}", uri=f"millrace://{application}/{path}")


def announce(outlet_events: Any, application: Application, path: str, made: Mapping[str, Any]) -> None:
    """Emit the event of the asset `path`, of whose alias the running task is an outlet, if `made` says that something
    changed. Also in a later try: one that died after its commit told nobody, and this one finds nothing left to change.
    Whoever hears of it twice finds nothing to do."""
    if made["changed"] or get_current_context()["ti"].try_number > 1:
        name = AssetAlias(f"{application.name}/{path}")
        outlet_events[name].add(asset(application.name, path), extra=dict(made))


def another(application: Application, path: str, waiting: Callable[[], object]) -> Any:
    """The last task of a stage that events of the asset `path` start and that takes one thing a run: it emits such an
    event while `waiting` finds more (is not None). Airflow makes one run of all events that come during a run."""
    alias = AssetAlias(f"{application.name}/{path}")

    @task(task_id="another", outlets=[alias])
    def emit(*, outlet_events: Any) -> None:
        if waiting() is not None:
            outlet_events[alias].add(asset(application.name, path))

    return emit()


def run_name() -> str:
    """Who writes, for provenance: DAG, run and task of the running task, and the person who triggered the run."""
    context = get_current_context()
    person = context["dag_run"].triggering_user_name
    return f"{context['dag'].dag_id}/{context['run_id']}/{context['ti'].task_id}" + (f" by {person}" if person else "")


def interval() -> tuple[datetime, datetime]:
    """Data interval of the running task. A run without one, triggered without a logical date, fails for good."""
    context = get_current_context()
    start, end = context.get("data_interval_start"), context.get("data_interval_end")
    if start is None or end is None:
        raise AirflowFailException("this run has no data interval; trigger it with a logical date, or by a backfill")
    return start, end


def succeeded(dag_id: str, logical_dates: Sequence[datetime] | None) -> int:
    """How many runs of a DAG succeeded, of these logical dates or ever. Within a task."""
    dates = None if logical_dates is None else list(logical_dates)
    return get_current_context()["ti"].get_dr_count(dag_id=dag_id, logical_dates=dates, states=["success"])


def failed(dag_id: str) -> int:
    """How many runs of a DAG failed, of those that Airflow keeps. Within a task."""
    return get_current_context()["ti"].get_dr_count(dag_id=dag_id, states=["failed"])


def known_before() -> dict[str, Any]:
    """What the running task returned when it last succeeded, in a run of an earlier date; empty: it never did."""
    ti = get_current_context()["ti"]
    before = ti.get_previous_ti(state="success")
    found = before and ti.xcom_pull(task_ids=ti.task_id, run_id=before.run_id, map_indexes=-1)
    return found or {}


class AlertNotifier(BaseNotifier):
    """Sends to the place that alerts go to (`millrace.alerts`): by default, that a task failed and why."""

    template_fields = ("title", "what")

    def __init__(self, title: str = "{{ dag.dag_id }}.{{ ti.task_id }} failed", what: str = "") -> None:
        super().__init__()
        self.title = title
        self.what = what

    def notify(self, context: Any) -> None:
        what = self.what or str(context.get("exception") or "no reason was given")
        _alert(self.title, what, context["dag"].dag_id, context["run_id"])


def approvers() -> list[dict[str, str]] | None:
    """Whom Airflow lets answer what waits for a person; None: whoever may act on DAGs."""
    settings = read_settings()
    if not settings.reached_by_others:
        return None
    return [{"id": name, "name": name} for name, role in settings.airflow_users.items() if role != "viewer"] or None


class Approval(HITLOperator):
    """Asks a person, and writes the answer down itself: what was asked and who answered stay in Airflow's own record,
    which no XCom is in. Any operator may rewrite an XCom."""

    def __init__(
        self,
        *,
        ask: Callable[[Any], dict[str, Any]],
        record: Callable[[dict[str, Any], Mapping[str, Any]], object],
        **options: Any,
    ) -> None:
        """
        Args:
            ask: takes the task's context; `asks` and `told` of what it returns are shown.
            record: takes what `ask` returned, and the answer.
        """
        form = {"reason": Param("", type="string", description="Why; kept in the journal")}
        shown = {"subject": "", "options": ["Approve", "Reject"], "params": form, "assigned_users": approvers()}
        super().__init__(**options | shown | {"retries": 0})
        self.ask = ask
        self.record = record

    def execute(self, context: Any) -> None:
        asked = self.ask(context)
        self.subject, self.body = asked["asks"], asked["told"]
        try:
            super().execute(context)
        except TaskAwaitingInput as waiting:
            _alert(f"{self.dag_id} waits: {self.subject}", self.body, self.dag_id, context["run_id"])
            waiting.kwargs = {"asked": asked}
            raise

    def execute_complete(self, context: Any, event: dict[str, Any], *, asked: dict[str, Any]) -> None:
        self.record(asked, super().execute_complete(context, event))


def hide_secrets(context: Any) -> None:
    """Airflow calls this before a task: whatever that logs or fails with, its log has stars in a secret's place."""
    from airflow.sdk.log import mask_secret

    from millrace.secret_sources import secrets_of, values_of

    for secret in secrets_of(read_settings()):
        for value in values_of(secret):
            mask_secret(value)


def late_after(minutes: float) -> DeadlineAlert:
    """An alert for a run that has not ended this long after it was queued: late, or dead."""
    return DeadlineAlert(
        name="late",
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(minutes=minutes),
        callback=SyncCallback("millrace_airflow.say_late", {"minutes": minutes}),
    )


def say_late(minutes: float, context: dict[str, Any]) -> None:
    """Airflow calls this, on a worker, when a run's deadline has passed; of a run that failed too."""
    run = context["dag_run"]
    if run["state"] in ("success", "failed"):
        return
    what = f"run {run['dag_run_id']} has not ended {minutes:g} minutes after it was queued; it is {run['state']}"
    _alert(f"{run['dag_id']} is late", what, run["dag_id"], run["dag_run_id"])


def _alert(title: str, what: str, dag_id: str, run_id: str) -> None:
    from millrace.alerts import Alert, send

    settings = read_settings()
    send(Alert(title, what, f"{dag_id}/{run_id}", f"{settings.airflow_url}/dags/{dag_id}"), settings)


def stage(application: Application, name: str, runbook: str, *, tag: str, **options: Any) -> DAG:
    """The DAG `<application>.<name>`, with what all stages share: one run at a time (but of a backfill), a deadline,
    two retries with growing waits, and an alert when they are used up.

    Args:
        options: of `DAG`; they go before what is shared.
    """
    shared = {
        "catchup": False,
        "max_active_runs": 1,
        "deadline": late_after(getattr(application.deadlines, name)),
        "default_args": {
            "owner": application.owner,
            "retries": 2,
            "retry_delay": timedelta(seconds=15),
            "retry_exponential_backoff": True,
            "max_retry_delay": timedelta(minutes=10),
            "on_execute_callback": [hide_secrets],
            "on_failure_callback": [AlertNotifier()],
        },
        "doc_md": runbook,
        "tags": [application.name, tag],
    }
    return DAG(dag_id=f"{application.name}.{name}", **(shared | options))
