"""`python -m tests.serving.a_replica <application>`: one of several gateways, as its environment says, over the real
registry: split and versions are what is published there, and a parrot answers in each version's name."""

import sys
from collections.abc import Callable

import uvicorn

from millrace.applications import Application
from millrace.releases.pipeline import AnswerPipeline
from millrace.serving.gateway import create_app
from millrace.serving.traffic import RegisteredReleases
from millrace.settings import read_settings
from tests.serving.parrot import Drawer, Parrot, a_release


class Parrots(RegisteredReleases):
    def __init__(self, *about: object) -> None:
        super().__init__(*about)  # type: ignore[arg-type]
        self.load: Callable[[str], AnswerPipeline] = lambda version: a_release(Parrot(), Drawer())
        self.unload = lambda version: None


settings = read_settings()
application = Application.model_validate(
    {
        "name": sys.argv[1],
        "description": "d",
        "sources": [{"kind": "python_topics"}],
        "prompt": {"template": "{{ question }}"},
        "rollout": {"steps": [{"share": 0.5, "margin": 0.3}]},
    }
)
uvicorn.run(create_app(settings, [application], Parrots), host="127.0.0.1", port=settings.gateway_port, log_config=None)
