"""What a part's process finds in its environment: the deployment's settings, budgets, and nothing of other tools.

The one place that passes on this process's own environment. It does not know which part it is for.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from millrace.secret_sources import variable_for
from millrace.settings import Settings

# Another Airflow's home, another Spark or another virtual environment in the caller's shell must not reach ours.
_FOREIGN = (
    "AIRFLOW", "MLFLOW_", "_MLFLOW", "MILLRACE_", "SPARK_", "PYSPARK_", "PG", "GUNICORN_", "UVICORN_", "PYTHONPATH",
    "PYTHONHOME", "VIRTUAL_ENV", "CONDA_", "UV_",
)  # fmt: skip
_THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_MAX_THREADS", "RAYON_NUM_THREADS",
)  # fmt: skip
OF_ADMINISTRATORS = frozenset({"access_secrets", "airflow_passwords", "backup_airflow_url", "backup_mlflow_url"})
"""Secrets that no part may know, whatever else it knows: they open every wall, and every database."""
_QUIET = {
    "DO_NOT_TRACK": "1",
    "SCARF_ANALYTICS": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # glibc gives every thread an arena of its own; two are enough here and keep memory down.
    "MALLOC_ARENA_MAX": "2",
    # Airflow renames its processes; without this, the name is written over what identifies them as ours.
    "SPT_NOENV": "1",
}


def part_environment(settings: Settings, *, threads: int, keys: bool) -> dict[str, str]:
    """The whole environment of a part's process, less what only that part needs.

    Args:
        threads: how many the numerical libraries in it may use.
        keys: whether it may know the keys that sign completions and make pseudonyms.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    binaries = str(Path(sys.executable).parent)
    local = f"127.0.0.1,localhost,{settings.host}"
    bypass = ",".join(filter(None, (inherited.get("NO_PROXY") or inherited.get("no_proxy"), local)))
    return (
        inherited
        | _QUIET
        | {name: str(threads) for name in _THREADS}
        | {
            "PATH": f"{binaries}{os.pathsep}{inherited.get('PATH', os.defpath)}",
            "VIRTUAL_ENV": str(Path(sys.prefix)),
            "NO_PROXY": bypass,
            "no_proxy": bypass,
            "MLFLOW_TRACKING_URI": settings.mlflow_url,
        }
        | _mlflow_login(settings, os.environ)
        | settings_variables(settings, keys=keys)
    )


def settings_variables(settings: Settings, *, keys: bool) -> dict[str, str]:
    """`settings` as the `MILLRACE_` variables that read back to the same settings, less what is an administrator's;
    without `keys`, less its keys."""
    variables = {}
    for name in type(settings).model_fields:
        if name in OF_ADMINISTRATORS:
            continue
        value = getattr(settings, name)
        variable = f"MILLRACE_{name.upper()}"
        if isinstance(value, SecretStr):
            if not keys:
                continue
            variable, text = variable_for(variable, value)
        elif isinstance(value, (frozenset, set, tuple, list)):
            text = json.dumps(sorted(value))
        elif isinstance(value, dict):
            text = json.dumps(value)
        else:
            text = str(value)
        variables[variable] = text
    return variables


def lake_credential(settings: Settings) -> dict[str, str]:
    """The credential of the lake, for a part that needs no other key."""
    given = {"MILLRACE_LAKE_ACCESS_KEY": settings.lake_access_key, "MILLRACE_LAKE_SECRET_KEY": settings.lake_secret_key}
    return dict(variable_for(name, value) for name, value in given.items())


def _mlflow_login(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """How to log in to an MLflow server elsewhere, from the caller's environment."""
    if not settings.mlflow_uri:
        return {}
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    return {name: environment[name] for name in names if name in environment}
