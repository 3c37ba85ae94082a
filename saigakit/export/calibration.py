"""Compute an importance matrix on the user's records, for quantising with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saigakit import data
from saigakit.core import manifest, workspace
from saigakit.core.files import require_absent, scratch, sha256
from saigakit.core.lazy import datasets
from saigakit.data import rows, sources
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.export.gguf_export import Export
from saigakit.export.merge_plan import MergePlan
from saigakit.export.stage import write_gguf
from saigakit.llamacpp import imatrix
from saigakit.weights import base_files

OF_RECORDS = "records"  # `importance` for a matrix computed on the training records
STAGE, _MATRIX = "03_importance", "imatrix.gguf"
_CONVERSATIONS = 2_000  # evenly spread over the file; more do not change a matrix
_LONGEST = 2048  # tokens of a conversation


def importance_of_records(
    records: str | Path,
    plan: MergePlan,
    output: str | Path,
    *,
    quant_types: Sequence[str] = (),
    max_tokens: int = 50_000,
    n_gpu_layers: int = 0,
) -> Path:
    """Write llama.cpp's importance matrix of the merged model, computed with a Q8_0 GGUF in the scratch directory.

    About `max_tokens` are read, in rows evenly spread over the records.
    Raises SaigaError first if `output` exists, or there is no room for files of `quant_types` next to it.
    """
    file = Path(output)
    require_absent(file)
    if quant_types:  # before hours of computing
        Export.of(plan, quant_types).require_room(file.parent)
    encoded = token_rows(records, plan)
    ids = [encoded[index]["input_ids"] for index in range(len(encoded))]
    with scratch() as directory:
        matrix = imatrix.compute_importance(
            write_gguf(Export.of(plan, ["Q8_0"]), directory / "q8_0.gguf"),
            spread(ids, max(1, len(ids) * max_tokens // sum(map(len, ids)))),
            dataset=Path(records).name,
            n_gpu_layers=n_gpu_layers,
        )
    return matrix.write(file)


def importance_matrix(
    importance: str | None,
    *,
    model: str,
    run_dir: str | Path,
    adapter: str | None = "02_train",
    base_source: str | None = None,
    max_tokens: int = 20_000,
    n_gpu_layers: int = 0,
    quant_type: str | None = None,
) -> Path | None:
    """Resolve `importance` for merge_gguf: None, a file, or "records": computed once, in `run_dir`/03_importance.

    Raises SaigaError before that if no GGUF of `quant_type` could be made afterwards.
    """
    if importance != OF_RECORDS:
        return None if importance is None else workspace.find_input(importance, run_dir=run_dir)
    plan = MergePlan.of(model, adapter, run_dir=run_dir, base_source=base_source)
    if (records := sources.formatted_records("train", run_dir)) is None:
        raise SaigaError(
            f"importance={OF_RECORDS!r} needs 01_format/train.jsonl, which is not in {run_dir} or attached. Run "
            "01_format first, or give a file."
        )
    final = Path(run_dir) / STAGE
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {"model": model, "base_source": base_source, "max_tokens": max_tokens},
        "inputs": {
            "records": sha256(records),
            "base": base_files.hashes(plan.base_dir),
            "adapter": manifest.hashes(plan.adapter_dirs[0]) if plan.adapter_dirs else None,
        },
    }
    if not manifest.is_up_to_date(final, **identity, may_replace=True):
        with manifest.making(final, **identity, may_replace=True) as partial:
            importance_of_records(
                records,
                plan,
                partial / _MATRIX,
                quant_types=[quant_type] if quant_type else [],
                max_tokens=max_tokens,
                n_gpu_layers=n_gpu_layers,
            )
    return final / _MATRIX


def token_rows(records: str | Path, plan: MergePlan) -> "datasets.Dataset":
    """Conversations evenly spread over the records, encoded as for training."""
    conversations = spread(data.read_conversations(sources.records_files(str(records))), _CONVERSATIONS)
    return rows.tokenise(conversations, plan.read_tokenizer(), _LONGEST, name=Path(records).name)
