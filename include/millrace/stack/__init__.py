"""The embedded stack: PostgreSQL, MLflow, Spark Connect, Airflow and the gateway on one machine, nothing installed.

It knows how to start, watch and end processes; it does not know what an application is, nor what a DAG does.

    home.py         the data directory: its format version, secrets, and the lock of whoever runs the stack
    rotation.py     a new completion key, while everything runs
    environment.py  what a part's process finds in its environment
    preflight.py    what must be true of the machine before anything starts
    postgres.py     PostgreSQL from its package
    part.py         what a part is: command, environment, readiness, what it needs
    parts.py        which parts there are; spark_parts.py has Spark's
    object_store.py an object store that the stack keeps, walled; versitygw.py is its server
    processes.py    start, record, find and end processes, so that none is left behind
    running.py      `Stack`: the order of things, and what to do when one dies
    supervisor.py   the process behind `millrace up`
    backup/         all of it saved, and restored to an empty place
    history.py      the part that keeps Airflow's database bounded
    status.py       what is running, asked from outside
"""

from millrace.stack.parts import with_keys_url
from millrace.stack.running import Progress, Stack
from millrace.stack.status import Status, airflow_of, down, status, up

__all__ = ["Progress", "Stack", "Status", "airflow_of", "down", "status", "up", "with_keys_url"]
