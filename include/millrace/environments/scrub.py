"""What may say who somebody is, taken out of free text: e-mail addresses, phone numbers, card numbers, IP addresses.

A short list, and pure: names, addresses of houses and whatever else a person writes about a person stay. Phone numbers
are found by Google's library (`phonenumbers`), which knows each country's numbers; card numbers by their check digit.
"""

import ipaddress
import re
from collections.abc import Iterable

from phonenumbers import SUPPORTED_REGIONS, PhoneNumberMatcher

from millrace.errors import SettingsError

_EMAIL = re.compile(r"[\w.+'-]{1,64}@(?:[\w-]{1,63}\.){1,8}\w{2,24}")
# Not within a longer run of digits and dots, which is a version or a number.
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,}(?!\d)")
"""At least; a date may follow the number, or a count stand before it."""
_CARD_DIGITS = range(13, 20)
_SHORTEST_PHONE = 7
"""Digits."""


class Scrubber:
    """Replaces each find by `[e-mail]`, `[ip]`, `[card]` or `[phone]`. Scrubbing twice changes nothing more.

    Args:
        regions: countries whose phone numbers are found without a country code; with one, every country's are.

    Raises:
        SettingsError: a region has no phone numbers that the library knows.
    """

    def __init__(self, regions: Iterable[str]) -> None:
        declared = tuple(regions)
        if unknown := sorted(set(declared) - set(SUPPORTED_REGIONS)):
            raise SettingsError(
                f"[sample] phone_regions names {', '.join(unknown)}, of which no phone numbers are known; "
                "use ISO country codes such as US, GB, DE"
            )
        self._regions = (None, *declared)

    def __call__(self, text: str | None) -> str | None:
        if not text:
            return text
        # What is left beside a find may be one itself. Each find takes digits, colons or an @, so it ends.
        while (scrubbed := self._once(text)) != text:
            text = scrubbed
        return text

    def _once(self, text: str) -> str:
        text = _EMAIL.sub("[e-mail]", text)
        text = _IPV4.sub(_address, text)
        text = _IPV6.sub(_address, text)
        text = _CARD.sub(_card, text)
        return self._phones(text)

    def _phones(self, text: str) -> str:
        if sum(character.isdigit() for character in text) < _SHORTEST_PHONE:
            return text
        for region in self._regions:
            for match in reversed(list(PhoneNumberMatcher(text, region))):
                text = f"{text[: match.start]}[phone]{text[match.end :]}"
        return text


def _address(found: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return found[0]
    # Nobody's, in a manual's example; and `a::b` is a name in C++.
    nobody = address.is_loopback or address.is_unspecified or address.is_reserved
    return found[0] if nobody else "[ip]"


def _card(found: re.Match[str]) -> str:
    """Each card number in a run of groups of digits replaced; it is whole groups, the most from where it begins."""
    text, groups = found[0], list(re.finditer(r"\d+", found[0]))
    kept, after, first = "", 0, 0
    while first < len(groups):
        begin = groups[first].start()
        ends = [group.end() for group in groups[first : first + _CARD_DIGITS[-1]]]
        end = next((end for end in reversed(ends) if _is_card(text[begin:end])), None)
        if end is None:
            first += 1
        else:
            kept, after = f"{kept}{text[after:begin]}[card]", end
            first += ends.index(end) + 1
    return kept + text[after:]


def _is_card(text: str) -> bool:
    """Whether it has a card number's count of digits, and its check digit (Luhn, US patent 2,950,048)."""
    digits = [int(digit) for digit in reversed(text) if digit.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return len(digits) in _CARD_DIGITS and (sum(digits[::2]) + sum(doubled)) % 10 == 0
