"""Only the files that are read count, not others in the directory of a base."""

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
    ids=["both formats", "a second copy", "other names", "subdirectory", "none"],
)
def test_reads_one_format_of_weights(names, read):
    assert base_files.weight_files(reversed(names)) == read


def test_neither_hashes_nor_counts_a_second_copy_of_the_weights(tmp_path):
    for name in ("config.json", "model.safetensors", "consolidated.safetensors", "LICENSE.txt", manifest.NAME):
        (tmp_path / name).write_bytes(b"four")
    (tmp_path / "below").mkdir()
    assert set(base_files.hashes(tmp_path)) == {"config.json", "model.safetensors"}
    assert base_files.weight_bytes(tmp_path) == 4
