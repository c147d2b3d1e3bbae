import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millrace.environments.scrub import Scrubber
from millrace.errors import SettingsError

SCRUB = Scrubber(["US", "DE"])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("mail Ann.Lee+x@mail.example.co.uk, please", "mail [e-mail], please"),
        ("call +44 20 7946 0958", "call [phone]"),
        ("call (415) 555-2671 or 030/901820.", "call [phone] or [phone]."),
        ("card 4111-1111-1111-1111 or 378282246310005", "card [card] or [card]"),
        ("4111 1111 1111 1111 12/26 123", "[card] 12/26 123"),
        ("2 4111 1111 1111 1111, 4111111111111111 4111-1111-1111-1111 4", "2 [card], [card] [card] 4"),
        ("from 203.0.113.7:8080 and fe80::1ff:fe23:4567:890a", "from [ip]:8080 and [ip]"),
        ("10.1.2.3.", "[ip]."),
    ],
)
def test_what_leads_to_a_person_goes(text: str, left: str) -> None:
    assert SCRUB(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "What is the default of [core] parallelism?",
        "Added in version 3.0.0 on 2026-11-24 at 10:20:30; 604800 seconds.",
        "std::vector, a::b, ::1, http://127.0.0.1:8080, 0.0.0.0",
        "order 4111 1111 1111 1112",  # no card: its check digit is wrong
        "decorators like @task(retries=2), user@host",
        "",
    ],
)
def test_what_leads_to_nobody_stays(text: str) -> None:
    assert SCRUB(text) == text


@given(st.text("0123456789.:-+@ ()/abcdef", max_size=60))
@example("-56465 3173 4 0895359 45-3 558846163-7-933577004286148925567")
def test_scrubbing_twice_changes_nothing_more(text: str) -> None:
    once = SCRUB(text)
    assert SCRUB(once) == once


def test_a_country_that_nobody_can_call_is_refused_with_its_name() -> None:
    with pytest.raises(SettingsError, match=r"phone_regions names XX, of which no phone numbers are known"):
        Scrubber(["US", "XX"])
