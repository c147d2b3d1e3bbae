"""Contrastive fine-tuning of a BERT embedding model: a question nearer to its chunk than to its hard negative and the
other chunks of the batch.

The loss is InfoNCE (van den Oord et al., 2018, arXiv:1807.03748) with the other pairs of the batch as negatives
(Henderson et al., 2017, arXiv:1705.00652: "multiple negatives ranking loss"). Pooling and lengths are those of
`retrieval/embedding_model.py`. Knows no tables and no releases.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from millrace.applications import EmbeddingTraining
from millrace.errors import TrainingError

SCALE = 20.0
"""Of the cosines, the inverse of the temperature, as sentence-transformers has it."""
WARMUP = 0.1
"""Share of the steps."""
CLIP = 1.0
GROUP = 8
"""Texts that are computed at once."""
RANKED = 10
"""Depth of the mean reciprocal rank."""

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Texts → vectors of unit length, shape (n, dimensions)."""


@dataclass(frozen=True)
class Triple:
    """Texts to learn from. Equal `positive` texts are one chunk."""

    question: str
    positive: str
    negative: str


@dataclass(frozen=True, order=True)
class Found:
    """How well questions find their chunks; the greater the better."""

    recall: float
    """Share whose chunk is among the first `depth`."""
    reciprocal_rank: float
    """Mean, of the first 10; 0 beyond."""


def measure(embed: Embed, questions: Sequence[str], right: Sequence[int], passages: Sequence[str], depth: int) -> Found:
    """
    Args:
        right: for each question, the position of its chunk in `passages`.
        depth: chunks that are looked at.
    """
    cosines = embed(questions) @ embed(passages).T
    ranks = [int((row > row[at]).sum()) for row, at in zip(cosines, right, strict=True)]
    return Found(
        float(np.mean([rank < depth for rank in ranks])),
        float(np.mean([1 / (rank + 1) if rank < RANKED else 0.0 for rank in ranks])),
    )


def tune(
    source: Path,
    triples: Sequence[Triple],
    configuration: EmbeddingTraining,
    judge: Callable[[Embed], Found],
    *,
    threads: int,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train the model in folder `source`; a repeat on the same machine with as many threads gives the same weights.

    Args:
        judge: measures a model; called after every epoch.

    Returns:
        The weights of the best epoch, and of every epoch `loss`, `recall`, `reciprocal_rank`.

    Raises:
        TrainingError: the loss is not a number.
    """
    import torch

    with _reproducible(configuration.seed, threads):
        model = _Model(source)
        steps = configuration.epochs * math.ceil(len(triples) / configuration.batch)
        optimizer = torch.optim.AdamW(model.bert.parameters(), lr=configuration.learning_rate)
        warm = max(round(WARMUP * steps), 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
        )
        best: tuple[Found, dict[str, Any]] | None = None
        curve = []
        for _ in range(configuration.epochs):
            losses: list[float] = []
            model.bert.train()
            order = torch.randperm(len(triples)).tolist()
            for start in range(0, len(order), configuration.batch):
                loss = _loss(model, [triples[at] for at in order[start : start + configuration.batch]])
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"the loss is {loss.item()} after {len(losses)} steps; declare a lower embedding_training."
                        f"learning_rate than {configuration.learning_rate:g}"
                    )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.bert.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            model.bert.eval()
            found = judge(model.embed)
            curve.append({"loss": float(np.mean(losses)), **vars(found)})
            if best is None or found > best[0]:
                best = found, {name: value.detach().clone() for name, value in model.bert.state_dict().items()}
    assert best is not None
    return best[1], curve


class _Model:
    """The model with what goes before and after it."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(
            json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
        )
        self._tokenizer.enable_padding()

    def vectors(self, texts: Sequence[str]) -> Any:
        """Mean over the mask, then unit length: shape (n, dimensions)."""
        import torch

        # Of one length as far as they can be: a long text among short ones would cost all of them its length.
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        groups = [[texts[at] for at in order[start : start + GROUP]] for start in range(0, len(order), GROUP)]
        return torch.cat([self._padded(group) for group in groups])[torch.tensor(order).argsort()]

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        import torch

        with torch.no_grad():
            vectors: npt.NDArray[np.float32] = self.vectors(texts).numpy()
        return vectors

    def _padded(self, texts: Sequence[str]) -> Any:
        import torch

        encoded = self._tokenizer.encode_batch(list(texts))
        ids = torch.tensor([one.ids for one in encoded])
        mask = torch.tensor([one.attention_mask for one in encoded])
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


def _loss(model: _Model, batch: Sequence[Triple]) -> Any:
    import torch

    questions = model.vectors([triple.question for triple in batch])
    passages = [triple.positive for triple in batch] + [triple.negative for triple in batch]
    cosines = questions @ model.vectors(passages).T
    # Two questions may have one chunk, and what is found in place of one question's chunk may be another's: neither is
    # a negative of the question whose chunk it is.
    right = torch.tensor([[passage == triple.positive for passage in passages] for triple in batch])
    own = torch.eye(len(batch), len(passages), dtype=torch.bool)
    cosines = cosines.masked_fill(right & ~own, -torch.inf)
    return torch.nn.functional.cross_entropy(cosines * SCALE, torch.arange(len(batch)))


@contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    """The caller's generator and its number of threads are as they were after it."""
    import torch

    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
