"""Only what a gateway with the key issued passes."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import SourceError
from millrace.sources.completion_id import issue, verify

AT = datetime(2026, 11, 24, 23, 5, tzinfo=UTC)


def test_an_issued_id_says_its_application_and_time_to_whoever_has_the_key() -> None:
    issued = verify(b"key", issue(b"key", "qa", AT))
    assert (issued.application, issued.at) == ("qa", AT)


def test_ids_are_never_the_same() -> None:
    assert len({issue(b"key", "qa", AT) for _ in range(1000)}) == 1000


def test_another_key_does_not_verify() -> None:
    with pytest.raises(SourceError, match="was not issued by this deployment"):
        verify(b"other", issue(b"key", "qa", AT))


@given(position=st.integers(0, 200), character=st.characters())
def test_changing_any_character_is_noticed(position: int, character: str) -> None:
    good = issue(b"key", "qa", AT)
    position %= len(good)
    changed = good[:position] + character + good[position + 1 :]
    if changed != good:
        with pytest.raises(SourceError):
            verify(b"key", changed)


@given(st.text(max_size=300))
def test_made_up_ids_are_refused(text: str) -> None:
    for made_up in (text, "chatcmpl-" + text):
        with pytest.raises(SourceError):
            verify(b"key", made_up)
