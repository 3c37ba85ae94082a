"""A model and the user's records into an importance matrix before quantising, and into a table of quality after."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from saigakit import activations, data, export, models, quality, rows, tokenization, workspace
from saigakit.rows import Rows
from saigakit.tables import Table

_CONVERSATIONS = 2_000  # evenly spread over the file; more do not change a matrix


def importance_of_records(
    records: str | Path,
    *,
    model: str,
    adapter: str | Path | None,
    output: str | Path,
    base_source: str | None = None,
    max_seq_length: int = 2048,
    max_tokens: int = 50_000,
    n_gpu_layers: int = 0,
) -> Path:
    """The importance matrix of the merged model on the ids that it was trained on, in llama.cpp's form, as `output`.

    A Q8_0 GGUF is made in the scratch directory for it, and deleted. Raises SaigaError where there is no room for it.
    """
    ids = _rows(records, model, base_source, max_seq_length)
    with tempfile.TemporaryDirectory(dir=workspace.scratch_dir()) as scratch:
        whole = export.to_gguf(
            model=model,
            adapter=adapter,
            output=Path(scratch) / "q8_0.gguf",
            quant_type="Q8_0",
            base_source=base_source,
        )
        made = activations.measured(
            whole,
            [ids[index]["input_ids"] for index in range(len(ids))],
            dataset=Path(records).name,
            max_tokens=max_tokens,
            n_gpu_layers=n_gpu_layers,
        )
    return made.write(output)


def quality_by_type(
    files: Mapping[str, Path],
    reference: str | Path,
    records: str | Path,
    *,
    model: str,
    base_source: str | None = None,
    max_seq_length: int = 2048,
    max_tokens: int = 5_000,
    n_gpu_layers: int = 0,
) -> Table:
    """Size, perplexity, divergence and equal top tokens of each file on the answers of held-out `records`.

    `reference` is a float16 or Q8_0 GGUF of the same model; it is read once for each file.
    """
    held_out = _rows(records, model, base_source, max_seq_length)
    chosen = data.spread(held_out, len(held_out) * max_tokens // max(1, sum(held_out.learned)) + 1)
    measured = {
        name: quality.against(reference, file, chosen, max_tokens=max_tokens, n_gpu_layers=n_gpu_layers)
        for name, file in files.items()
    }
    return quality.table(files, measured)


def _rows(records: str | Path, model: str, base_source: str | None, limit: int) -> Rows:
    spec = models.find(model)
    conversations = data.spread(data.read_conversations(records), _CONVERSATIONS)
    tokenizer = tokenization.load_tokenizer(spec.name, base_source)
    return rows.store(conversations, tokenizer, limit, name=Path(records).name)
