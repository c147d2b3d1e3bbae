"""From examples to the batches of every step and process. Pure; it knows nothing of models.

Loss counts on the answer alone: its tokens and the end of the turn, so that the model learns to stop.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from millrace.engines.chat import END_OF_TURN, chat_prompt
from millrace.engines.engine import Message

WINDOW = 8
"""Steps within which examples are sorted by length."""

Tokenize = Callable[[str], list[int]]
"""Text to token ids; control tokens of the chat template are one token each."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """With the end of the turn."""

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def longest(self) -> int:
        return self.tokens


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Encoded
    rejected: Encoded

    @property
    def sides(self) -> tuple[Encoded, Encoded]:
        return self.chosen, self.rejected

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.chosen.prompt

    @property
    def tokens(self) -> int:
        return self.chosen.tokens + self.rejected.tokens

    @property
    def longest(self) -> int:
        """Tokens of the longer of both."""
        return max(self.chosen.tokens, self.rejected.tokens)


def encode(prompt: str, answer: str, tokenize: Tokenize) -> Encoded:
    """The example exactly as the generator meets it when it answers."""
    # A control token inside an answer would end the turn early; `chat_prompt` spells those apart in prompts.
    plain = answer.strip().replace("<|", "< |")
    asked = chat_prompt([Message("user", prompt)])
    return Encoded(tuple(tokenize(asked)), tuple(tokenize(plain + END_OF_TURN)))


def split_development(
    training: Sequence[int], prompts: Sequence[str], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Of the positions to train on, those that stay so, and the development split: at least one prompt, at most 32."""
    kept, apart = split_held_out([prompts[i] for i in training], share, seed + 1, most=32)
    return [training[i] for i in kept], [training[i] for i in apart]


def split_held_out(prompts: Sequence[str], share: float, seed: int, most: int = 16) -> tuple[list[int], list[int]]:
    """Positions to train on and positions to measure on: those of at least one prompt, of at most `most`. What shares a
    prompt, as two pairs of one question do, is on one side."""
    positions: dict[str, list[int]] = {}
    for position, prompt in enumerate(prompts):
        positions.setdefault(prompt, []).append(position)
    order = list(positions.values())
    random.Random(seed).shuffle(order)
    size = min(most, len(order) - 1, max(1, round(len(order) * share)))
    kept, apart = (sorted(chain.from_iterable(groups)) for groups in (order[size:], order[:size]))
    return kept, apart


Schedule = list[list[list[list[int]]]]
"""`[step][accumulation][process]` → the examples of one micro-batch."""


def schedule(
    lengths: Sequence[int], *, epochs: int, processes: int, micro_batch: int, accumulation: int, seed: int
) -> Schedule:
    """Every step of a run. Each example occurs at least once in each epoch.

    Processes wait for each other after each micro-batch, so micro-batches that run at the same time are of
    similar length. The last step of an epoch is filled up with examples from the epoch's beginning.
    """
    at_once = processes * micro_batch
    per_step = at_once * accumulation
    steps: Schedule = []
    for epoch in range(epochs):
        chance = random.Random(seed * 1_000_003 + epoch)
        order = list(range(len(lengths)))
        chance.shuffle(order)
        missing = -len(order) % per_step
        order += [order[i % len(order)] for i in range(missing)]
        for start in range(0, len(order), WINDOW * per_step):
            window = sorted(order[start : start + WINDOW * per_step], key=lambda i: lengths[i])
            groups = [window[i : i + at_once] for i in range(0, len(window), at_once)]
            chance.shuffle(groups)
            shared = [[group[p * micro_batch : (p + 1) * micro_batch] for p in range(processes)] for group in groups]
            steps += [shared[i : i + accumulation] for i in range(0, len(shared), accumulation)]
    return steps
