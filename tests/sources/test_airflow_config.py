import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.applications import AirflowConfigSource
from millrace.errors import SourceError
from millrace.sources.airflow_config import OptionFacts, describe, plain, read_facts
from millrace.sources.reading import read_source

LINE = st.text(string.ascii_letters + string.digits + " .:[]{}%_-/'\"", min_size=1).map(str.strip).filter(bool)
NAME = st.text(string.ascii_lowercase + "_", min_size=1)


def test_every_option_of_the_reference_is_a_document_with_its_facts() -> None:
    documents = {document.title: document for document in read_source(AirflowConfigSource(kind="airflow_config"))}
    assert len(documents) > 300
    text = documents["[core] parallelism"].content.decode()
    assert "AIRFLOW__CORE__PARALLELISM" in text
    assert "\nDefault: 32\n" in text
    assert "maximum number of task instances" in text


def test_the_facts_of_every_option_are_read_back_from_its_text() -> None:
    for document in read_source(AirflowConfigSource(kind="airflow_config")):
        facts = read_facts(document.content.decode())
        assert facts is not None
        assert document.title == f"[{facts.section}] {facts.name}"
        assert describe(facts).encode() == document.content


@pytest.mark.slow
@given(
    st.builds(
        OptionFacts,
        section=NAME,
        name=NAME,
        type=NAME,
        variable=NAME,
        default=st.none() | LINE,
        version_added=st.none() | LINE,
        example=st.none() | LINE,
        description=st.lists(LINE).map("\n".join),
    )
)
def test_reading_facts_undoes_describing_them(facts: OptionFacts) -> None:
    assert read_facts(describe(facts)) == facts


@pytest.mark.parametrize("text", ["", "Any other text.", "The option x is in the section"])
def test_other_text_has_no_facts(text: str) -> None:
    assert read_facts(text) is None


def test_only_declared_sections_are_read() -> None:
    documents = list(read_source(AirflowConfigSource(kind="airflow_config", sections=("triggerer",))))
    assert {document.section for document in documents} == {"triggerer"}


def test_a_section_that_is_not_there_is_said_by_name() -> None:
    with pytest.raises(SourceError, match="no section nonsense"):
        list(read_source(AirflowConfigSource(kind="airflow_config", sections=("core", "nonsense"))))


@pytest.mark.parametrize(
    ("markup", "shown"),
    [
        ("Use ``True`` or `False`.", "Use True or False."),
        ("See `the docs\n<https://example.org>`__.", "See the docs."),
        ("See :ref:`config:core`, :class:`~airflow.sdk.DAG`.", "See config:core, airflow.sdk.DAG."),
        ("One\n\n.. code-block:: ini\n\n    [core]\n", "One\n\n    [core]"),
        ("**Important**: no", "Important: no"),
    ],
)
def test_markup_is_reduced_to_what_it_shows(markup: str, shown: str) -> None:
    assert plain(markup) == shown
