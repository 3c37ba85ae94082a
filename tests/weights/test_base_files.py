"""Of a base's directory what is read counts, and nothing that lies beside it."""

import pytest

from saigakit.core import manifest
from saigakit.weights import base_files

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        ([INDEX, *SHARDS, "consolidated.safetensors", "training_args.bin"], SHARDS),
        ([INDEX, "weights-1.safetensors", "pytorch_model.bin"], ["weights-1.safetensors"]),
        (["pytorch_model.bin", "models/model.safetensors", "training_args.bin"], ["pytorch_model.bin"]),
        (["weights.safetensors", "config.json"], []),
    ],
    ids=["both kinds", "a second copy", "other names", "below", "none"],
)
def test_one_kind_of_weights_is_read(names, read):
    assert base_files.weights(reversed(names)) == read


def test_a_second_copy_of_the_weights_is_neither_hashed_nor_counted(tmp_path):
    for name in ("config.json", "model.safetensors", "consolidated.safetensors", "LICENSE.txt", manifest.NAME):
        (tmp_path / name).write_bytes(b"four")
    (tmp_path / "below").mkdir()
    assert set(base_files.hashes(tmp_path)) == {"config.json", "model.safetensors"}
    assert base_files.weight_bytes(tmp_path) == 4
