"""An importance matrix computed on the tiny Saiga's records, files quantised with it, and their quality."""

import gguf
import pytest

from saigakit import data, export
from saigakit.core import workspace
from saigakit.core.files import sha256
from saigakit.export import calibration, quality
from saigakit.export.merge_plan import MergePlan
from saigakit.llamacpp.imatrix import Importance
from saigakit.prompt import encoding

MODEL = "saiga_tiny"


@pytest.fixture(scope="module")
def matrix(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("matrix") / "imatrix.gguf"
    plan = MergePlan.of(MODEL, "released")
    return calibration.importance_of_records(tiny / "records.jsonl", plan, output, max_tokens=2_000)


def test_the_matrix_is_computed_on_the_ids_of_the_training(tiny, matrix):
    read = Importance.read(matrix)
    tokenizer = encoding.load_tokenizer(MODEL)
    rows = encoding.encode_rows(data.read_conversations(tiny / "records.jsonl"), tokenizer)
    tokens = sum(len(row["input_ids"]) for each in rows for row in each)
    (count,) = {squares.count for squares in read.squares.values()}
    assert count == tokens if tokens <= 2_000 else 1_000 < count < 3_000
    assert read.datasets == ("records.jsonl",)


def test_no_file_stays_in_the_scratch_directory(matrix):
    assert not list(workspace.scratch_dir().rglob("q8_0.gguf"))


@pytest.mark.slow
def test_files_quantised_with_and_without_a_matrix_are_compared(tiny, matrix, tmp_path):
    options = {"model": MODEL, "adapter": "released"}
    reference = export.to_gguf(**options, output=tmp_path / "f16.gguf", quant_type="F16")
    files = {
        f"Q4_0 {name}": export.to_gguf(**options, output=tmp_path / name, quant_type="Q4_0", importance=importance)
        for name, importance in (("plain", None), ("weighed", matrix))
    }
    metadata = gguf.GGUFReader(files["Q4_0 weighed"])
    assert metadata.get_field("quantize.imatrix.file").contents() == f"sha256:{sha256(matrix)}"
    assert metadata.get_field("quantize.imatrix.dataset") is None
    rows = calibration.token_rows(tiny / "records.jsonl", MergePlan.of(MODEL, None))
    found = {name: quality.compare_files(reference, file, rows, max_tokens=500) for name, file in files.items()}
    assert found["Q4_0 plain"].divergence != found["Q4_0 weighed"].divergence
    assert all(0 < one.divergence < 1 and one.tokens >= 500 for one in found.values())
