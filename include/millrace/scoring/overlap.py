"""Scores by overlap with a reference: of an answer's words, and of retrieved documents.

Pure; knows neither where answers come from nor what a score decides. Answers are normalised and compared as in
SQuAD (Rajpurkar et al., 2016, arXiv:1606.05250, `evaluate-v1.1.py`); gain is discounted as by Järvelin and
Kekäläinen (2002, doi:10.1145/582415.582418).
"""

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised_words(text: str) -> list[str]:
    """Lower case, no ASCII punctuation, no English articles, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of both, counted with repetition.

    Two empty texts score 1, an empty one against a text 0 (as SQuAD 2.0 scores no-answer).
    """
    ours, theirs = normalised_words(answer), normalised_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    # 2·P·R / (P + R) with P = common / |ours| and R = common / |theirs|.
    return 2 * common / (len(ours) + len(theirs))


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same words in the same order, else 0."""
    return float(normalised_words(answer) == normalised_words(reference))


def recall_at_k(found: Sequence[str], relevant: Collection[str], k: int) -> float:
    """Share of the `relevant` ids among the first `k` of `found`. No relevant ids: 1, nothing was missed."""
    wanted = set(relevant)
    return len(wanted & set(found[:k])) / len(wanted) if wanted else 1.0


def ndcg(found: Sequence[str], relevant: Collection[str], k: int) -> float:
    """Normalised discounted cumulative gain of the first `k`, with gain 1 for a relevant id (counted where it
    occurs first) and 0 otherwise. No relevant ids: 1."""
    wanted = set(relevant)
    if not wanted:
        return 1.0
    gain, seen = 0.0, set[str]()
    for rank, item in enumerate(found[:k]):
        if item in wanted and item not in seen:
            gain += 1 / math.log2(rank + 2)
            seen.add(item)
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(len(wanted), k)))
    return gain / ideal if ideal else 0.0
