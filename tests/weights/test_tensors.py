import os
import pickle

import numpy as np
import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

from saigakit.errors import SaigaError
from saigakit.weights import tensors


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return small_models.base(tmp_path_factory.mktemp("whole"), tiny / "base")


def as_bin(base_dir, directory, parts):
    """The same weights as `parts` .bin shards with their index."""
    stored = load_file(base_dir / "model.safetensors")
    names = [f"pytorch_model-{i + 1:05}-of-{parts:05}.bin" for i in range(parts)]
    weight_map = {name: names[i % parts] for i, name in enumerate(sorted(stored))}
    for file in names:
        torch.save({name: stored[name] for name in stored if weight_map[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text("{}")
    small_models.edit_json(directory / "pytorch_model.bin.index.json", weight_map=weight_map)
    return directory


def test_shards_hold_the_same_tensors_as_one_file(whole, tiny, tmp_path):
    split = tensors.open_base(small_models.base(tmp_path, tiny / "base", shards="100KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one = tensors.open_base(whole)
    assert set(split.stored) == set(one.stored)
    assert all(np.array_equal(split.read(name), one.read(name)) for name in one.stored)


def test_bin_shards_hold_the_same_tensors_as_safetensors(whole, tmp_path):
    found, one = tensors.open_base(as_bin(whole, tmp_path, 3)), tensors.open_base(whole)
    assert {name: stored.shape for name, stored in found.stored.items()} == {
        name: stored.shape for name, stored in one.stored.items()
    }
    assert all(np.array_equal(found.read(name), one.read(name)) for name in one.stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_converts_16_bit_floats_to_float32_without_loss(tmp_path, dtype, suffix):
    tensor = torch.randn(8, 5).to(dtype)
    if suffix == "bin":
        torch.save({"x": tensor}, tmp_path / "pytorch_model.bin")
    else:
        save_file({"x": tensor}, tmp_path / "model.safetensors")
    read = tensors.open_base(tmp_path).read("x")
    assert read.dtype == np.float32
    assert np.array_equal(read, tensor.to(torch.float32).numpy())


def test_names_a_truncated_shard_before_reading_tensors(tiny, tmp_path):
    small_models.base(tmp_path, tiny / "base", shards="100KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    small_models.cut(victim)
    with pytest.raises(SaigaError, match=victim.name):
        tensors.open_base(tmp_path)


def test_names_a_truncated_bin_shard(whole, tmp_path):
    small_models.cut(as_bin(whole, tmp_path, 2) / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(SaigaError, match=r"pytorch_model-00002-of-00002\.bin"):
        tensors.open_base(tmp_path)


def test_names_a_missing_shard_of_the_index(tiny, tmp_path):
    small_models.base(tmp_path, tiny / "base", shards="100KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    victim.unlink()
    with pytest.raises(SaigaError, match=victim.name):
        tensors.open_base(tmp_path)


def test_names_a_tensor_of_the_index_that_no_shard_holds(tiny, tmp_path):
    small_models.base(tmp_path, tiny / "base", shards="100KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    stored = load_file(victim)
    lost = min(stored)
    save_file({name: stored[name] for name in stored if name != lost} | {"more": torch.ones(1)}, victim)
    with pytest.raises(SaigaError, match=lost):
        tensors.open_base(tmp_path)


def test_refuses_a_pickle_with_code_without_running_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(SaigaError, match=r"pytorch_model\.bin"):
        tensors.open_base(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_refuses_quantised_weights_by_type(tmp_path):
    save_file({"x": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(SaigaError, match="x is of type U8"):
        tensors.open_base(tmp_path).read("x")


def test_names_the_expected_files_if_there_are_no_weights(tmp_path):
    with pytest.raises(SaigaError, match=r"model\*\.safetensors or pytorch_model\*\.bin"):
        tensors.open_base(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_a_bin_file_are_writable_contiguous_copies(tmp_path, dtype):
    matrix = torch.arange(12, dtype=dtype).reshape(4, 3)
    torch.save({"x": matrix, "transposed": matrix.t()}, tmp_path / "pytorch_model.bin")
    weights = tensors.open_base(tmp_path)
    for name, wanted in (("x", matrix), ("transposed", matrix.t())):
        found = weights.read(name, slice(1, 3))
        assert found.flags.c_contiguous
        found += 1
        np.testing.assert_array_equal(weights.read(name, slice(1, 3)), wanted[1:3].float().numpy())
