"""A small typed client of Airflow's REST API: find DAGs, start runs, watch them, read what they returned.

It does not know what any DAG does, nor how Airflow was started.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from millrace.errors import StackError

ENDED = frozenset({"success", "failed"})
"""States in which a run stays."""
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Run:
    """One DAG run. Times are UTC."""

    dag_id: str
    run_id: str
    state: str
    """queued, running, success or failed."""
    run_type: str
    """scheduled, manual, backfill, asset_triggered, …"""
    run_after: datetime
    logical_date: datetime | None
    data_interval_start: datetime | None
    data_interval_end: datetime | None
    start: datetime | None
    end: datetime | None
    conf: dict[str, Any]


@dataclass(frozen=True)
class TaskInstance:
    """One task of one run."""

    task_id: str
    map_index: int
    state: str | None
    """None: not scheduled yet."""
    try_number: int
    start: datetime | None
    end: datetime | None


class Airflow:
    """Airflow at `url`, as one user. Every call raises `StackError` where Airflow doesn't answer or refuses."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._login = {"username": user, "password": password}
        # Airflow is on this machine or near: no proxy from the environment applies.
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False)
        self._token = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def healthy(self) -> dict[str, bool]:
        """Component (`scheduler`, `dag_processor`, `triggerer`, `metadatabase`) → whether it is healthy."""
        answer = self._call("GET", "/monitor/health")
        return {name: value["status"] == "healthy" for name, value in answer.items() if value}

    def dag_exists(self, dag_id: str) -> bool:
        return self._call("GET", f"/dags/{_path(dag_id)}", missing=True) is not None

    def wait_for_dag(self, dag_id: str, timeout: float = 120) -> None:
        """Until Airflow has read the DAG. After `timeout` seconds, `StackError` with the errors of DAG files."""
        deadline = time.monotonic() + timeout
        while not self.dag_exists(dag_id):
            if time.monotonic() > deadline:
                errors = "; ".join(f"{file}: {text}" for file, text in self.import_errors().items())
                raise StackError(f"no DAG {dag_id} after {timeout:.0f} s; errors in DAG files: {errors or 'none'}")
            time.sleep(_POLL_SECONDS)

    def import_errors(self) -> dict[str, str]:
        """DAG file → why it can't be read."""
        found = self._call("GET", "/importErrors", params={"limit": 100})["import_errors"]
        return {one["filename"]: one["stack_trace"].strip() for one in found}

    def pause(self, dag_id: str, paused: bool = True) -> None:
        self._call("PATCH", f"/dags/{_path(dag_id)}", json={"is_paused": paused})

    def unpause(self, dag_id: str) -> None:
        """A time-driven DAG whose first interval has ended runs at that moment."""
        self.pause(dag_id, False)

    def is_paused(self, dag_id: str) -> bool:
        paused: bool = self._call("GET", f"/dags/{_path(dag_id)}")["is_paused"]
        return paused

    def trigger(
        self,
        dag_id: str,
        params: Mapping[str, Any] | None = None,
        *,
        logical_date: datetime | None = None,
        data_interval: tuple[datetime, datetime] | None = None,
        note: str | None = None,
    ) -> Run:
        """Start a run, and unpause the DAG if it is paused: its runs would wait for ever.

        If a paused DAG's next interval is due, unpausing would start a run of that interval beside this one; so
        this run takes that interval, unless the caller names another.
        """
        dag = self._call("GET", f"/dags/{_path(dag_id)}")
        body: dict[str, Any] = {"logical_date": logical_date and logical_date.isoformat()}
        if data_interval:
            body["data_interval_start"], body["data_interval_end"] = (moment.isoformat() for moment in data_interval)
        elif dag["is_paused"] and logical_date is None and _is_due(dag):
            body["logical_date"] = dag["next_dagrun_logical_date"]
            body["data_interval_start"] = dag["next_dagrun_data_interval_start"]
            body["data_interval_end"] = dag["next_dagrun_data_interval_end"]
        if params:
            body["conf"] = dict(params)
        if note:
            body["note"] = note
        made = self._call("POST", f"/dags/{_path(dag_id)}/dagRuns", json=body)
        if dag["is_paused"]:
            self.unpause(dag_id)
        return _run(made)

    def run(self, dag_id: str, run_id: str) -> Run:
        return _run(self._call("GET", _run_path(dag_id, run_id)))

    def runs(
        self,
        dag_id: str,
        *,
        since: datetime | None = None,
        run_type: str | None = None,
        states: Iterable[str] = (),
        limit: int = 100,
    ) -> list[Run]:
        """The latest `limit` runs of a DAG (`~`: of any), oldest first.

        Args:
            since: only runs that were due at or after this moment.
            run_type: `asset_triggered`: only those that assets started.
        """
        params: dict[str, Any] = {"limit": limit, "order_by": "-run_after", "state": list(states)}
        if since:
            params["run_after_gte"] = since.isoformat()
        if run_type:
            params["run_type"] = run_type
        answer = self._call("GET", f"/dags/{_path(dag_id)}/dagRuns", params=params)
        return [_run(one) for one in reversed(answer["dag_runs"])]

    def wait_for_asset_run(self, dag_id: str, since: datetime, timeout: float) -> Run:
        """The first run that an asset started since `since`, as soon as there is one; `StackError` after `timeout`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.runs(dag_id, since=since, run_type="asset_triggered")
            if found:
                return found[0]
            time.sleep(_POLL_SECONDS)
        raise StackError(f"no asset started {dag_id} within {timeout:.0f} s; see its schedule in Airflow")

    def tasks(self, dag_id: str, run_id: str) -> list[TaskInstance]:
        """In the order in which they started; what hasn't started is last."""
        answer = self._call("GET", f"{_run_path(dag_id, run_id)}/taskInstances", params={"limit": 100})
        found = [
            TaskInstance(
                task_id=one["task_id"],
                map_index=one["map_index"],
                state=one["state"],
                try_number=one["try_number"],
                start=_moment(one["start_date"]),
                end=_moment(one["end_date"]),
            )
            for one in answer["task_instances"]
        ]
        return sorted(found, key=lambda task: (task.start is None, task.start.timestamp() if task.start else 0.0))

    def wait_for_run(
        self,
        dag_id: str,
        run_id: str,
        timeout: float,
        on_change: Callable[[str], None] = lambda tasks: None,
    ) -> Run:
        """Until the run has ended; the caller looks at its `state`. `StackError` after `timeout` seconds.

        Args:
            on_change: called with a line such as "land success, refine running", whenever that line is another.
        """
        deadline = time.monotonic() + timeout
        seen = ""
        while True:
            run, tasks = self.run(dag_id, run_id), self.tasks(dag_id, run_id)
            now = ", ".join(_told(task) for task in tasks if task.state) or run.state
            if now != seen:
                seen = now
                on_change(now)
            if run.state in ENDED:
                return run
            if time.monotonic() > deadline:
                raise StackError(f"{dag_id} ({run_id}) is {run.state} after {timeout:.0f} s: {now}")
            time.sleep(_POLL_SECONDS)

    def result(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """What the task returned, or None."""
        path = f"{_run_path(dag_id, run_id)}/taskInstances/{_path(task_id)}/xcomEntries/return_value"
        answer = self._call("GET", path, params={"deserialize": False, "stringify": False}, missing=True)
        return answer and answer["value"]

    def log_tail(self, dag_id: str, run_id: str, task: TaskInstance, lines: int = 20) -> str:
        """The last lines of a task's latest try, for a message about its failure."""
        path = f"{_run_path(dag_id, run_id)}/taskInstances/{_path(task.task_id)}/logs/{max(task.try_number, 1)}"
        answer = self._call("GET", path, params={"map_index": task.map_index, "full_content": True})
        content = answer["content"]
        entries = content.splitlines() if isinstance(content, str) else [_log_line(entry) for entry in content]
        return "\n".join(entries[-lines:])

    def answer(self, dag_id: str, run_id: str, task_id: str, option: str, **values: str) -> None:
        """Answer a task that asks a person, as the user that this client logs in as.

        Args:
            values: of the form's fields.
        """
        path = f"{_run_path(dag_id, run_id)}/taskInstances/{_path(task_id)}/-1/hitlDetails"
        self._call("PATCH", path, json={"chosen_options": [option], "params_input": values})

    def clear_run(self, dag_id: str, run_id: str) -> None:
        """Run every task of a run again."""
        self._call("POST", f"{_run_path(dag_id, run_id)}/clear", json={"dry_run": False})

    def backfill(
        self, dag_id: str, start: datetime, end: datetime, *, reprocess: str = "completed", at_once: int = 10
    ) -> int:
        """Run every interval between `start` and `end`; returns the backfill's id.

        Args:
            reprocess: `none`: only intervals without a run; `failed`; `completed`: also those that succeeded.
            at_once: runs beside one another. The DAG's own limit is for runs of other kinds.
        """
        body = {
            "dag_id": dag_id,
            "from_date": start.isoformat(),
            "to_date": end.isoformat(),
            "reprocess_behavior": reprocess,
            "max_active_runs": at_once,
        }
        made: int = self._call("POST", "/backfills", json=body)["id"]
        return made

    def wait_for_backfill(self, backfill: int, timeout: float) -> None:
        """Until Airflow counts the backfill as completed (it looks every 30 s); `StackError` after `timeout`."""
        deadline = time.monotonic() + timeout
        while self._call("GET", f"/backfills/{backfill}")["completed_at"] is None:
            if time.monotonic() > deadline:
                raise StackError(f"backfill {backfill} is not completed after {timeout:.0f} s; see it in Airflow")
            time.sleep(_POLL_SECONDS)

    def ensure_pool(self, name: str, *, slots: int, description: str) -> None:
        """Create the pool unless it exists: whoever changed its slots keeps them."""
        if self._call("GET", f"/pools/{_path(name)}", missing=True) is None:
            self._call("POST", "/pools", json={"name": name, "slots": slots, "description": description})

    def pool_slots(self, name: str) -> int:
        slots: int = self._call("GET", f"/pools/{_path(name)}")["slots"]
        return slots

    def _call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        missing: bool = False,
    ) -> Any:
        """The answer's JSON; with `missing`, None for a 404."""
        answer = self._send(method, path, json, params)
        if answer.status_code == 401:
            self._token = ""
            answer = self._send(method, path, json, params)
        if missing and answer.status_code == 404:
            return None
        if answer.status_code == 403:
            raise StackError(
                f"Airflow at {self._client.base_url} does not let {self._login['username']} {method} {path}; ask as "
                "somebody whose role may (MILLRACE_AIRFLOW_USERS)"
            )
        if answer.is_error:
            raise StackError(f"Airflow refused {method} {path} with {answer.status_code}: {answer.text[:500]}")
        return answer.json() if answer.content else None

    def _send(self, method: str, path: str, json: Any, params: Mapping[str, Any] | None) -> httpx.Response:
        try:
            if not self._token:
                login = self._client.post("/auth/token", json=self._login)
                if login.is_error:
                    raise StackError(
                        f"Airflow at {self._client.base_url} refused the login of {self._login['username']}"
                    )
                self._token = login.json()["access_token"]
            headers = {"Authorization": f"Bearer {self._token}"}
            return self._client.request(method, f"/api/v2{path}", json=json, params=params, headers=headers)
        except httpx.HTTPError as error:
            raise StackError(
                f"Airflow at {self._client.base_url} does not answer ({error!r}); `millrace status` shows what runs"
            ) from None


def _path(part: str) -> str:
    return quote(part, safe="~")


def _run_path(dag_id: str, run_id: str) -> str:
    return f"/dags/{_path(dag_id)}/dagRuns/{_path(run_id)}"


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _is_due(dag: Mapping[str, Any]) -> bool:
    due = _moment(dag["next_dagrun_run_after"])
    return dag["next_dagrun_logical_date"] is not None and due is not None and due <= datetime.now(UTC)


def _told(task: TaskInstance) -> str:
    again = f" (try {task.try_number})" if task.try_number > 1 else ""
    return f"{task.task_id} {task.state}{again}"


def _run(answer: Mapping[str, Any]) -> Run:
    return Run(
        dag_id=answer["dag_id"],
        run_id=answer["dag_run_id"],
        state=answer["state"],
        run_type=answer["run_type"],
        run_after=datetime.fromisoformat(answer["run_after"]),
        logical_date=_moment(answer["logical_date"]),
        data_interval_start=_moment(answer["data_interval_start"]),
        data_interval_end=_moment(answer["data_interval_end"]),
        start=_moment(answer["start_date"]),
        end=_moment(answer["end_date"]),
        conf=answer["conf"] or {},
    )


def _log_line(entry: Any) -> str:
    """Airflow's structured log entry as a line: its event, and the error if it carries one."""
    if not isinstance(entry, dict):
        return str(entry)
    errors = entry.get("error_detail") or []
    reason = "".join(f" [{one.get('exc_type')}: {one.get('exc_value')}]" for one in errors)
    return f"{entry.get('event', '')}{reason}"
