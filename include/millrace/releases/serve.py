"""`python -m millrace.releases.serve FOLDER`: one release over HTTP, as MLflow serves a model, with no other server.

FOLDER is as `millrace release container` writes it. `POST /invocations` takes MLflow's JSON, `GET /ping` says that the
release is loaded; both are MLflow's own. What `MLFLOW_PYFUNC_INFERENCE_CONFIG` says (`package.LOAD_CONFIG`) goes before
what the folder says. One process, so that a container's signals arrive: SIGTERM lets requests come to their end.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from millrace.errors import MillraceError, ReleaseError
from millrace.releases.package import LOAD_CONFIG

MODEL, INDEX, LOAD = "model", "index", "load.json"
"""Names in the folder: the MLflow model, index builds by lineage, and what `load_model` is told (`LOAD_CONFIG`)."""
CONFIG_VARIABLE = "MLFLOW_PYFUNC_INFERENCE_CONFIG"
REQUEST_SECONDS = 600
PATIENCE = 30
"""Seconds that requests may take to end after SIGTERM."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m millrace.releases.serve", description="Serve one release.")
    parser.add_argument("folder", type=Path, help="as `millrace release container` writes it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    given = parser.parse_args()
    # MLflow's own limit is a minute, for all rows of a request together, and what ran on would be asked again.
    os.environ.setdefault("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    import uvicorn
    from mlflow.pyfunc import load_model
    from mlflow.pyfunc.scoring_server import init

    try:
        config = _config(given.folder.absolute(), os.environ.pop(CONFIG_VARIABLE, "") or "{}")
        app = init(load_model(str(given.folder / MODEL), model_config=config))
    except MillraceError as error:
        sys.exit(str(error))
    uvicorn.run(app, host=given.host, port=given.port, access_log=False, timeout_graceful_shutdown=PATIENCE)


def _config(folder: Path, said: str) -> dict[str, Any]:
    """
    Raises:
        ReleaseError: the folder is not whole, or the variable is not JSON with keys of `LOAD_CONFIG`.
    """
    try:
        told = json.loads((folder / LOAD).read_text())
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{folder / LOAD} can't be read: {error}; write the folder again") from None
    try:
        changes = dict(json.loads(said))
    except (ValueError, TypeError) as error:
        raise ReleaseError(f"{CONFIG_VARIABLE} is no JSON object: {error}") from None
    unknown = sorted(changes.keys() - LOAD_CONFIG.keys())
    if unknown:
        raise ReleaseError(f"{CONFIG_VARIABLE} names {', '.join(unknown)}; known are {', '.join(LOAD_CONFIG)}")
    here: dict[str, Any] = {"index_builds": str(folder / INDEX)} if (folder / INDEX).is_dir() else {}
    return here | told | changes


if __name__ == "__main__":
    main()
