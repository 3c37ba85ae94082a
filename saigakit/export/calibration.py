"""A model and the user's records into an importance matrix before quantising."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saigakit import data, registry
from saigakit.core import manifest, workspace
from saigakit.core.files import require_absent, sha256
from saigakit.data import rows, sources
from saigakit.data.conversations import spread
from saigakit.data.rows import Rows
from saigakit.errors import SaigaError
from saigakit.export.stage import require_possible, to_gguf
from saigakit.llamacpp import imatrix_compute
from saigakit.prompt import encoding
from saigakit.weights import base_files, find
from saigakit.weights.lineage import MergeInto

OF_RECORDS = "records"  # for `importance`: a matrix of the records that the model was trained on
STAGE, _MATRIX = "03_importance", "imatrix.gguf"
_CONVERSATIONS = 2_000  # evenly spread over the file; more do not change a matrix
_LONGEST = 2048  # tokens of one


def importance_of_records(
    records: str | Path,
    *,
    model: str,
    adapter: str | Path | None,
    output: str | Path,
    base_source: str | None = None,
    merge_into: MergeInto = "auto",
    max_tokens: int = 50_000,
    n_gpu_layers: int = 0,
    quant_types: Sequence[str] = (),
) -> Path:
    """The importance matrix of the merged model on the ids that it was trained on, in llama.cpp's form, as `output`.

    `records`: as for 01_format. A Q8_0 GGUF is made in the scratch directory for it, and deleted. Raises SaigaError
    where there is no room for it or for files of `quant_types` beside `output`, or `output` is there already.
    """
    require_absent(Path(output))
    if quant_types:  # before hours of computing
        require_possible(model, adapter, base_source, quant_types, merge_into, Path(output).parent)
    ids = token_rows(records, model, base_source)
    with tempfile.TemporaryDirectory(dir=workspace.scratch_dir()) as scratch:
        whole = to_gguf(
            model=model,
            adapter=adapter,
            output=Path(scratch) / "q8_0.gguf",
            quant_type="Q8_0",
            base_source=base_source,
            merge_into=merge_into,
        )
        made = imatrix_compute.measured(
            whole,
            [ids[index]["input_ids"] for index in range(len(ids))],
            dataset=Path(records).name,
            max_tokens=max_tokens,
            n_gpu_layers=n_gpu_layers,
        )
    return made.write(output)


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
    """What `export.merge_gguf` takes as importance: nothing, a file that is here or attached, or "records".

    Then it is a matrix of the training records of 01_format, made once and kept in `run_dir`/03_importance; where no
    GGUF of `quant_type` can be made afterwards, that is said before.
    """
    if importance != OF_RECORDS:
        return None if importance is None else workspace.find_input(importance, run_dir=run_dir)
    spec, records = registry.find(model), sources.formatted_records("train", run_dir)
    if records is None:
        raise SaigaError(
            f"importance={OF_RECORDS!r} needs 01_format/train.jsonl, which is not in {run_dir} or attached: run "
            "01_format first, or give a file."
        )
    adapter_dir = None if adapter is None else find.adapter_dir(spec, adapter, run_dir)
    final = Path(run_dir) / STAGE
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {"model": model, "base_source": base_source, "max_tokens": max_tokens},
        "inputs": {
            "records": sha256(records),
            "base": base_files.hashes(find.base_dir(spec, base_source)),
            "adapter": None if adapter_dir is None else manifest.hashes(adapter_dir),
        },
    }
    if not manifest.is_up_to_date(final, **identity, may_replace=True):
        with manifest.making(final, **identity, may_replace=True) as partial:
            importance_of_records(
                records,
                model=model,
                adapter=adapter_dir,
                output=partial / _MATRIX,
                base_source=base_source,
                max_tokens=max_tokens,
                n_gpu_layers=n_gpu_layers,
                quant_types=[quant_type] if quant_type else [],
            )
    return final / _MATRIX


def token_rows(records: str | Path, model: str, base_source: str | None) -> Rows:
    """Conversations evenly spread over the records, as training has them."""
    spec = registry.find(model)
    conversations = spread(data.read_conversations(sources.records_files(str(records))), _CONVERSATIONS)
    tokenizer = encoding.load_tokenizer(spec.name, base_source)
    return rows.store(conversations, tokenizer, _LONGEST, name=Path(records).name)
