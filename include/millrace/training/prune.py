"""A model file with fewer transformer blocks: those that change what passes through them the least.

Blocks are ranked once, by their influence on the prompts that the application answers (ShortGPT, Men et al., 2024,
arXiv:2403.03853), and left out of the file; what stays keeps its bytes, and was never trained to work without the rest:
a recovery tune must follow. It knows nothing of that tune, nor of releases.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from millrace.engines.chat import chat_prompt
from millrace.engines.engine import Message
from millrace.engines.gguf_file import open_gguf, read_weights, rewrite
from millrace.engines.gguf_header import read_gguf_header
from millrace.errors import TrainingError
from millrace.training.loop import load

FEWEST = 2
"""Blocks that stay: the first one reads the embeddings, the last one is what the output was trained on."""


@dataclass(frozen=True)
class Pruned:
    """What was left out of a model."""

    removed: tuple[int, ...]
    """The blocks' numbers in the source, ascending."""
    influence: tuple[float, ...]
    """Of each block of the source; see `block_influence`."""


def prune(
    source: Path,
    target: Path,
    prompts: Sequence[str],
    *,
    remove: int,
    cache: Path,
    max_tokens: int,
    threads: int,
) -> Pruned:
    """Write the model in `source` without its `remove` least influential blocks to `target`, whole or not at all.

    The first and the last block always stay. The same input gives the same bytes.

    Args:
        prompts, cache, max_tokens, threads: as of `block_influence`.

    Raises:
        EngineError: `source` isn't a whole GGUF file.
        TrainingError: it isn't a Llama, hasn't that many blocks to spare, or its influence can't be measured.
    """
    count = _blocks(source)
    if not 1 <= remove <= count - FEWEST:
        raise TrainingError(
            f"{remove} of the {count} blocks of {source.name} can't be removed: the first and the last one stay, and "
            f"the number must be at least 1 and at most {max(0, count - FEWEST)}"
        )
    influence = block_influence(source, prompts, cache=cache, max_tokens=max_tokens, threads=threads)
    inner = sorted(range(1, count - 1), key=lambda block: influence[block])
    removed = tuple(sorted(inner[:remove]))
    write_pruned(source, target, removed)
    return Pruned(removed, influence)


def block_influence(
    source: Path, prompts: Sequence[str], *, cache: Path, max_tokens: int, threads: int
) -> tuple[float, ...]:
    """How much each block of the model in `source` changes what passes through it, in the order of the blocks.

    Block influence (Men et al., 2024, arXiv:2403.03853): 1 − the cosine between a token's hidden state
    before the block and after, mean over all tokens of all prompts. 0: the block hands on what it was given; at most 2.

    Args:
        prompts: user messages; each is read as it is in training, with the chat template around it.
        cache: where the model is converted, as for training (`engines/converted.py`).
        max_tokens: of longer prompts the beginning counts. What follows would not change it: attention is causal.
        threads: of torch in this process, from now on.

    Raises:
        EngineError: `source` isn't a whole GGUF file.
        TrainingError: it isn't a Llama, there are no prompts, or what it computes are no numbers.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    count = _blocks(source)
    if not prompts:
        raise TrainingError(
            f"there are no prompts to measure the blocks of {source.name} with; give some that it will be asked"
        )
    torch.set_num_threads(threads)
    tokenizer, model = load(source, cache)
    decoder = model.model
    decoder.norm = torch.nn.Identity()  # transformers gives the last block's output only after this norm
    similar, tokens = np.zeros(count), 0
    with torch.inference_mode():
        for prompt in prompts:
            asked = chat_prompt([Message("user", prompt)])
            ids = tokenizer.encode(asked, add_special_tokens=False)[:max_tokens]
            states = decoder(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
            pairs = pairwise(state[0].double() for state in states)
            similar += [cosine_similarity(before, after, dim=-1).sum().item() for before, after in pairs]
            tokens += len(ids)
    influence = 1 - similar / tokens
    if not np.isfinite(influence).all():
        raise TrainingError(
            f"{source.name} computes values that are not numbers, from block {int(np.argmin(np.isfinite(influence)))} "
            "on; train or export the model again"
        )
    return tuple(float(one) for one in influence)


def write_pruned(source: Path, target: Path, blocks: Collection[int]) -> None:
    """Write the model in `source` without these blocks to `target`, whole or not at all.

    The blocks after them move up. Tensors keep their bytes, metadata but the number of blocks its values.

    Args:
        blocks: their numbers, from 0.

    Raises:
        EngineError: `source` isn't a whole GGUF file.
        TrainingError: it isn't a Llama, has no such block, or fewer than two would stay; or no block was named.
    """
    count = _blocks(source)
    removed = set(blocks)
    if not removed:
        raise TrainingError(f"no block of {source.name} was named; name at least one to leave out")
    if strange := sorted(removed - set(range(count))):
        raise TrainingError(f"{source.name} has no block {strange[0]}; its blocks are 0 to {count - 1}")
    kept = [block for block in range(count) if block not in removed]
    if len(kept) < FEWEST:
        raise TrainingError(
            f"without {len(removed)} of its {count} blocks {source.name} would have {len(kept)} left; at least "
            f"{FEWEST} must stay"
        )
    places = {block: place for place, block in enumerate(kept)}
    reader = open_gguf(source)
    names: dict[str, str | None] = {}
    for tensor in reader.tensors:
        if (found := re.match(r"blk\.(\d+)\.", tensor.name)) and (block := int(found[1])) < count:
            place = places.get(block)
            names[tensor.name] = None if place is None else f"blk.{place}.{tensor.name[found.end() :]}"
    rewrite(
        reader,
        target,
        kinds={},
        encode=read_weights,
        fields={"llama.block_count": len(kept)},
        names=names,
    )


def _blocks(source: Path) -> int:
    """How many blocks the model in `source` has."""
    metadata = read_gguf_header(source).metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise TrainingError(f"{source.name} is of architecture {architecture!r}; only 'llama' can be pruned")
    count = metadata.get("llama.block_count")
    if not isinstance(count, int):
        raise TrainingError(f"{source.name} doesn't say how many blocks it has (llama.block_count); export it again")
    return count
