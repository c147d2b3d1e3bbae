"""`python -m tests.serving.a_process <home>`: a gateway in a process of its own, to be killed. Prints its port."""

import socket
import sys
from pathlib import Path

import uvicorn

from millrace.applications import Application
from millrace.releases.split import Split
from millrace.serving.gateway import create_app
from millrace.settings import Settings
from tests.serving.parrot import Drawer, Parrot, Shelf, a_release

settings = Settings(
    home=Path(sys.argv[1]), completion_key="test completion key", pseudonym_key="test pseudonym key", answer_cache=False
)
qa = Application.model_validate(
    {
        "name": "qa",
        "description": "d",
        "sources": [{"kind": "python_topics"}],
        "prompt": {"template": "{{ question }}"},
        "rollout": {"steps": [{"share": 0.5, "margin": 0.2}]},
    }
)
shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(pause=0.001), Drawer())})
with socket.create_server(("127.0.0.1", 0)) as listening:
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(create_app(settings, [qa], lambda *_: shelf), log_config=None, timeout_graceful_shutdown=20)
    uvicorn.Server(config).run(sockets=[listening])
