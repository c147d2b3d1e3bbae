"""`python -m millrace.serving`: the gateway as a process. Listens at once; `/readyz` says when it can answer.

SIGTERM lets exchanges come to their end, then syncs and unloads.
"""

import logging
import sys

import uvicorn

from millrace.applications import load_applications
from millrace.errors import MillraceError
from millrace.secret_sources import WithoutSecrets
from millrace.serving.gateway import create_app
from millrace.settings import read_settings

PATIENCE = 30
"""Seconds that exchanges may take to end after SIGTERM."""
FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format=FORM)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = read_settings()
        for handler in logging.getLogger().handlers:
            handler.setFormatter(WithoutSecrets(FORM, settings))
        app = create_app(settings, load_applications(settings))
    except MillraceError as error:
        sys.exit(str(error))
    uvicorn.run(
        app,
        host=settings.listens_on,
        port=settings.gateway_port,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=PATIENCE,
    )


if __name__ == "__main__":
    main()
