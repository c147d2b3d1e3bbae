"""Only what a gateway with the key issued passes."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from millrace.errors import SettingsError, SourceError
from millrace.sources.completion_id import (
    CompletionKey,
    CompletionKeys,
    Issued,
    issue,
    read_keys,
    verify,
    write_keys,
)

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


ENDS = AT + timedelta(days=7)
OLD, NEWER, NEWEST = b"an old key", b"a newer key", b"the newest key"


def test_the_newest_key_signs_and_an_older_one_verifies_until_its_end() -> None:
    keys = CompletionKeys(
        SecretStr(write_keys([CompletionKey(NEWEST), CompletionKey(NEWER), CompletionKey(OLD, ENDS)]))
    )
    assert verify(NEWEST, keys.issue("qa", AT)).application == "qa"
    for key in (NEWEST, NEWER, OLD):
        assert keys.verify(issue(key, "qa", AT), ENDS) == Issued("qa", AT)
    late = ENDS + timedelta(seconds=1)
    assert keys.verify(issue(NEWER, "qa", AT), late).at == AT
    assert keys.verify(issue(OLD, "qa", AT), None).at == AT
    for key, at in ((OLD, late), (b"a stranger's", AT), (b"a stranger's", None)):
        with pytest.raises(SourceError, match="was not issued by this deployment"):
            keys.verify(issue(key, "qa", AT), at)


KEYS = st.from_regex(r"[a-zA-Z0-9=]([ -~]*[a-zA-Z0-9=])?", fullmatch=True).filter(lambda key: " until " not in key)
ENDINGS = st.none() | st.datetimes(timezones=st.just(UTC))


@given(KEYS, st.lists(st.tuples(KEYS, ENDINGS)))
def test_keys_are_read_as_they_were_written(first: str, others: list[tuple[str, datetime | None]]) -> None:
    keys = [CompletionKey(key.encode(), until) for key, until in [(first, None), *others]]
    assert read_keys(write_keys(keys)) == keys


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "MILLRACE_COMPLETION_KEY is empty"),
        ("\n  \n", "MILLRACE_COMPLETION_KEY is empty"),
        ("k3y until 2026-08-01T00:00:00Z", "the first key of MILLRACE_COMPLETION_KEY signs and has no end"),
        ("new\nk3y until tomorrow", "line 2 of MILLRACE_COMPLETION_KEY doesn't say until when"),
        ("new\nk3y until 2026-08-01T00:00:00", "line 2 of MILLRACE_COMPLETION_KEY doesn't say until when"),
    ],
)
def test_keys_that_cannot_be_understood_are_one_sentence_without_a_key(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refused:
        CompletionKeys(SecretStr(text))
    assert "k3y" not in str(refused.value)
