"""Whether two questions are nearly the same question. Pure; training leaves such out, the gate looks for them.

Words are compared as sets, each weighted by how rare it is among all questions at hand: questions made from one
pattern share their common words and still differ by the word that matters (Jaccard similarity with inverse
document frequencies; Spärck Jones, 1972, doi:10.1108/eb026526).
"""

import math
import string
from collections import Counter, defaultdict
from collections.abc import Sequence

NEAR = 0.8
"""Similarity from which two questions count as the same."""


def near_duplicates(questions: Sequence[str], held_out: Sequence[str]) -> dict[int, int]:
    """Which of `questions` are nearly one of `held_out`: position → position of the most similar held-out question.

    Case, punctuation around words and the order of words don't distinguish questions.
    """
    ours, theirs = [_words(text) for text in questions], [_words(text) for text in held_out]
    seen = Counter(word for words in {*ours, *theirs} for word in words)
    total = len({*ours, *theirs})
    weight = {word: math.log1p(total / count) for word, count in seen.items()}
    size = [sum(weight[word] for word in words) for words in theirs]
    having: dict[str, list[int]] = defaultdict(list)
    for position, words in enumerate(theirs):
        for word in words:
            having[word].append(position)
    found: dict[int, int] = {}
    for position, words in enumerate(ours):
        common: dict[int, float] = defaultdict(float)
        for word in words:
            for other in having.get(word, ()):
                common[other] += weight[word]
        own = sum(weight[word] for word in words)
        similarity = {other: shared / (own + size[other] - shared) for other, shared in common.items()}
        best = max(similarity, key=lambda other: (similarity[other], -other), default=None)
        if best is not None and similarity[best] >= NEAR:
            found[position] = best
    return found


def _words(text: str) -> frozenset[str]:
    # A word that is nothing but punctuation (an operator) is kept: it may be what the question is about.
    return frozenset(word.strip(string.punctuation) or word for word in text.lower().split())
