"""What a fine-tune minimises: answers' cross entropy (sft), or a preference of one answer over another (dpo).

An objective knows its examples, which it is asked about by position, and how they are laid out for the model. It
knows nothing of steps, processes and checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from millrace.training.batches import Encoded, Pair

IGNORED = -100
"""Where a position has no token to predict."""


class Objective(Protocol):
    measures: tuple[str, ...]
    """Names of what `measure` gives, the loss first."""

    def tokens(self, position: int) -> int:
        """Of one example."""

    def terms(self, position: int) -> int:
        """How many numbers an example adds to the sum that `loss` is. A step's loss is the mean of all of its own."""

    def loss(self, model: Any, positions: Sequence[int]) -> Any:
        """Of one micro-batch, the sum over its examples' terms, a scalar tensor."""

    def measure(self, model: Any, position: int) -> Any:
        """Of one example, a tensor with a number for each of `measures`."""


class Answers(NamedTuple):
    """What the model says at the positions that answers are learnt from."""

    logits: Any
    """(positions, vocabulary)"""
    wanted: Any
    """(positions): the token that comes next, or `IGNORED`."""
    owner: Any
    """(positions): which of the examples a position belongs to."""


Layout = Callable[[Any, Sequence[Encoded]], Answers]
"""How examples become the model's input."""


class Supervised:
    """Cross entropy of the answers' tokens."""

    measures: tuple[str, ...] = ("loss",)

    def __init__(self, examples: Sequence[Encoded], *, packing: bool) -> None:
        self._examples = examples
        self._layout = packed if packing else padded

    def tokens(self, position: int) -> int:
        return self._examples[position].tokens

    def terms(self, position: int) -> int:
        return len(self._examples[position].answer)

    def loss(self, model: Any, positions: Sequence[int]) -> Any:
        return -log_probabilities(self._layout(model, [self._examples[i] for i in positions])).sum()

    def measure(self, model: Any, position: int) -> Any:
        """The mean over the answer's tokens."""
        return -log_probabilities(padded(model, [self._examples[position]])) / self.terms(position)


class Preference:
    """Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290): for each pair
    -log σ(β·((log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected))))."""

    measures: tuple[str, ...] = ("loss", "accuracy")

    def __init__(
        self, pairs: Sequence[Pair], reference: Sequence[Sequence[float]], *, beta: float, packing: bool
    ) -> None:
        """
        Args:
            reference: for each pair, the log-probabilities that the base model gives to chosen and rejected.
        """
        self._pairs = pairs
        self._reference = reference
        self._beta = beta
        self._layout = packed if packing else padded

    def tokens(self, position: int) -> int:
        return self._pairs[position].tokens

    def terms(self, position: int) -> int:
        return 1

    def loss(self, model: Any, positions: Sequence[int]) -> Any:
        import torch

        return -torch.nn.functional.logsigmoid(self._margins(model, positions, self._layout)).sum()

    def measure(self, model: Any, position: int) -> Any:
        """The loss, and 1 if the model prefers the chosen answer more than the base model does, else 0."""
        import torch

        margin = self._margins(model, [position], padded)
        return torch.cat([-torch.nn.functional.logsigmoid(margin), (margin > 0).float()])

    def _margins(self, model: Any, positions: Sequence[int], layout: Layout) -> Any:
        import torch

        said = log_probabilities(layout(model, [side for i in positions for side in self._pairs[i].sides]))
        base = torch.tensor([value for i in positions for value in self._reference[i]], device=said.device)
        chosen, rejected = (said - base).reshape(-1, 2).unbind(1)
        return self._beta * (chosen - rejected)


def log_probabilities(answers: Answers) -> Any:
    """Of each answer, the sum over its tokens."""
    import torch

    losses = torch.nn.functional.cross_entropy(
        answers.logits.float(), answers.wanted, ignore_index=IGNORED, reduction="none"
    )
    count = int(answers.owner.max()) + 1
    return -torch.zeros(count, device=losses.device).index_add(0, answers.owner, losses)


def padded(model: Any, examples: Sequence[Encoded]) -> Answers:
    """A row an example.

    They are aligned at their ends, so that only the last positions go through the vocabulary's projection: it is a
    fifth of this model's work, and prompts are most of the tokens.
    """
    import torch

    width = max(example.tokens for example in examples)
    kept = max(len(example.answer) for example in examples)
    ids = torch.zeros((len(examples), width), dtype=torch.long)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    wanted = torch.full((len(examples), kept), IGNORED)
    for row, example in enumerate(examples):
        ids[row, width - example.tokens :] = torch.tensor(example.prompt + example.answer)
        mask[row, width - example.tokens :] = 1
        wanted[row, kept - len(example.answer) :] = torch.tensor(example.answer)
    # One example needs no mask, and attention without one is faster.
    told = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if len(examples) > 1 else {}
    device = model.device
    logits = model(
        input_ids=ids.to(device),
        use_cache=False,
        logits_to_keep=kept + 1,
        **{name: value.to(device) for name, value in told.items()},
    ).logits
    owner = torch.arange(len(examples)).repeat_interleave(kept)
    return Answers(logits[:, :-1].flatten(0, 1), wanted.flatten().to(device), owner.to(device))


def packed(model: Any, examples: Sequence[Encoded]) -> Answers:
    """One row, without padding. A token sees its own example only, and counts positions from that one's start."""
    import torch

    device = model.device
    lengths = torch.tensor([example.tokens for example in examples])
    starts = lengths.cumsum(0) - lengths
    example_of = torch.arange(len(examples)).repeat_interleave(lengths)
    ids = torch.tensor([token for example in examples for token in example.prompt + example.answer])
    at = torch.arange(len(ids))
    answers = torch.tensor([len(example.answer) for example in examples])
    first = starts + lengths - answers
    predicted = torch.cat([torch.arange(int(a), int(a + n)) for a, n in zip(first, answers, strict=True)])
    positions = at - starts[example_of]
    ids, at, example_of, predicted = (one.to(device) for one in (ids, at, example_of, predicted))
    sees = (example_of[:, None] == example_of) & (at[:, None] >= at)
    logits = model(
        input_ids=ids[None],
        # Four dimensions: taken as it is, not as a mask of padding.
        attention_mask=sees[None, None],
        position_ids=positions[None].to(device),
        use_cache=False,
        logits_to_keep=predicted - 1,
    ).logits
    return Answers(logits[0], ids[predicted], example_of[predicted])
