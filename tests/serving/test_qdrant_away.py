"""The gateway over index builds on a Qdrant server that goes away and comes back."""

from collections.abc import Callable, Iterator

import pytest

from millrace.releases.split import Split
from millrace.retrieval import server
from millrace.retrieval.search import Retriever
from tests.retrieval.stand_in import StandIn
from tests.serving.parrot import Drawer, Gateway, Parrot, Shelf, a_release
from tests.serving.searched import AlwaysNorth, a_build

pytestmark = pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(server, "WAITS", (0.01,))
    stand_in = StandIn()
    yield stand_in
    stand_in.stop()


@pytest.mark.slow
def test_while_qdrant_is_away_callers_get_503_and_one_sentence_and_then_answers_again(
    start: Callable[..., Gateway], stand_in: StandIn
) -> None:
    retriever: Drawer = Retriever(a_build(stand_in.url), AlwaysNorth())  # type: ignore[assignment, arg-type]
    gateway = start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), retriever)}))
    assert gateway.ask("before?").status_code == 200
    stand_in.stop()
    for _ in range(2):  # the second time, nothing of the first may have been kept as an answer
        response = gateway.ask("while it is away?")
        assert response.status_code == 503
        assert response.json()["error"]["message"].startswith(f"Qdrant at {stand_in.url} doesn't answer (")
    assert [event.kind for event in gateway.events()][2:] == ["accepted", "failed"] * 2
    back = StandIn(port=stand_in.server_port, disk=stand_in.disk)
    response = gateway.ask("while it is away?")
    assert response.status_code == 200
    assert gateway.events()[-1].index_build == "north"
    back.stop()
