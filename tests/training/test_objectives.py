"""What is minimised, on the real base model (two blocks of it), however its examples are laid out."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from millrace.training.batches import Encoded, Pair, encode
from millrace.training.loop import load
from millrace.training.objectives import Preference, Supervised, log_probabilities, packed, padded

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def loaded(two_blocks: Path) -> tuple[Any, Any]:
    return load(two_blocks, two_blocks.parent / "cache")


@pytest.fixture(scope="module")
def model(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


@pytest.fixture
def encoded(loaded: tuple[Any, Any], examples: list[dict[str, str]]) -> list[Encoded]:
    tokenize = partial(loaded[0].encode, add_special_tokens=False)
    longer = {"prompt": examples[0]["prompt"] * 3, "answer": "It is thirty-two, as the text above says."}
    return [encode(e["prompt"], e["answer"], tokenize) for e in [*examples[:2], longer]]


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    watched = {n: p for n, p in model.named_parameters() if ".0.self_attn" in n or ".1.mlp" in n}
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in watched.items()}


@pytest.mark.parametrize("packing", [False, True])
def test_a_micro_batch_is_the_sum_over_its_answers_tokens_whatever_stands_beside_them(
    model: Any, encoded: list[Encoded], packing: bool
) -> None:
    import torch

    alone = Supervised(encoded, packing=False)
    assert [alone.terms(i) for i in range(len(encoded))] == [len(example.answer) for example in encoded]
    wanted = sum(alone.loss(model, [i]) for i in range(len(encoded)))
    assert wanted.item() == pytest.approx(
        sum(alone.measure(model, i).item() * len(example.answer) for i, example in enumerate(encoded)), rel=1e-5
    )
    together = Supervised(encoded, packing=packing).loss(model, range(len(encoded)))
    assert together.item() == pytest.approx(wanted.item(), rel=1e-5)
    terms = sum(alone.terms(i) for i in range(len(encoded)))
    expected, found = gradients(model, wanted / terms), gradients(model, together / terms)
    assert len(expected) == 4 + 3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_packed_example_sees_nothing_of_its_neighbours(model: Any, encoded: list[Encoded]) -> None:
    import torch

    first, other, last = encoded
    with torch.no_grad():
        beside_first = packed(model, [first, last]).logits[len(first.answer) :]
        beside_other = packed(model, [other, last]).logits[len(other.answer) :]
        alone = padded(model, [last]).logits
    assert beside_first.shape == alone.shape
    torch.testing.assert_close(beside_first, alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(beside_other, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_a_preference_is_worth_what_the_paper_says(model: Any, encoded: list[Encoded], packing: bool) -> None:
    import torch

    first, other, _ = encoded
    pair = Pair(first, Encoded(first.prompt, other.answer))
    with torch.no_grad():
        chosen, rejected = log_probabilities(padded(model, pair.sides)).tolist()
        # A reference that likes the chosen answer less, and the rejected one more, than the model does.
        objective = Preference([pair, pair], [(chosen - 2, rejected + 1)] * 2, beta=0.5, packing=packing)
        assert objective.loss(model, [0, 1]).item() == pytest.approx(2 * math.log(1 + math.exp(-0.5 * 3)), rel=1e-3)
        assert objective.terms(0) + objective.terms(1) == 2
        assert objective.measure(model, 0).tolist() == pytest.approx([math.log(1 + math.exp(-1.5)), 1], rel=1e-3)
        same = Preference([pair], [(chosen, rejected)], beta=0.5, packing=packing)
        assert same.loss(model, [0]).item() == pytest.approx(math.log(2), rel=1e-4)
