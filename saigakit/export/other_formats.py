"""Export only the adapter as a GGUF, or the merged model as safetensors."""

import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

from saigakit.core import workspace
from saigakit.core.files import replacing, require_absent
from saigakit.core.lazy import gguf, huggingface_hub, np, safetensors, torch
from saigakit.errors import SaigaError
from saigakit.export.merge_plan import MergePlan
from saigakit.llamacpp.architecture import Architecture
from saigakit.weights import find
from saigakit.weights.adapter import Adapter
from saigakit.weights.load import NumberFormat
from saigakit.weights.merge import Merged
from saigakit.weights.tensors import FLOATS, Array

_ROWS = 4096  # of a stored copy, compared at a time
_ROUNDING = 2.0**-7  # twice that of bfloat16: a copy may have another number format than the base
_CHUNK = 1 << 24  # numbers merged at a time
_SHARD = 2 * 10**9  # bytes of a file, at most: it is in memory before it is written
_COPIED = (*find.IDS_DEPEND_ON, "generation_config.json", "vocab.json", "merges.txt")


def to_lora_gguf(*, model: str, adapter: str | Path, output: str | Path, base_source: str | None = None) -> Path:
    """Write the adapter in float32, for `lora_path` of llama-cpp-python and --lora of llama.cpp's programs."""
    file = Path(output)
    require_absent(file)
    plan = MergePlan.of(model, adapter, base_source=base_source, merge_into="original")
    architecture = Architecture.from_config(plan.base_dir)
    merged = plan.merge()
    plan.require_same_base()
    (lora, _), *_ = merged.adapters
    _require_low_rank(merged, lora)
    names = {source: name for name, source in architecture.source_names(merged.shapes).items()}
    if lost := sorted(set(lora.updates) - set(names)):
        raise SaigaError(f"{lora.directory} changes {lost[0]}, which a {architecture.kind.name} GGUF cannot hold.")
    alpha, tensors = _lora_tensors(lora, architecture, names)
    with replacing(file) as partial:
        _write_lora(partial, architecture.kind.name, lora.directory.name, alpha, tensors)
        _require_written(partial, tensors)
    return file


def _require_low_rank(merged: Merged, lora: Adapter) -> None:
    beyond = lora.beyond_lora("dora", "trained", "tokens", "biases")
    if beyond is None and merged.is_untied:
        beyond = "LoRA on the embeddings or the head of a base that ties them"
    if beyond is None:
        beyond = "a resized vocabulary" if merged.vocabulary else None
    if beyond is None:
        beyond = next((f"another {name} than the base" for name in lora.copies if _differs(merged, lora, name)), None)
    if beyond is not None:
        raise SaigaError(
            f"{lora.directory} uses {beyond}, and a LoRA GGUF can only hold low-rank matrices. Merge it instead "
            "(03_merge_gguf, or to_gguf)."
        )


def _differs(merged: Merged, lora: Adapter, name: str) -> bool:
    """Whether the stored copy of a base tensor differs by more than rounding."""
    for first in range(0, merged.base.stored[name].shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        ours, theirs = lora.weights.read(lora.copies[name], rows), merged.base.read(name, rows)
        if not np.allclose(ours, theirs, rtol=_ROUNDING, atol=1e-7):
            return True
    return False


def _lora_tensors(lora: Adapter, architecture: Architecture, names: dict[str, str]) -> tuple[float, dict[str, Array]]:
    """llama.cpp scales by alpha / rank with one alpha for all; what is left of a tensor's scale goes into its B."""
    ranks = {name: lora.weights.stored[update.a].shape[0] for name, update in lora.updates.items()}
    first = next(iter(lora.updates))
    alpha = lora.updates[first].scale * ranks[first]
    tensors: dict[str, Array] = {}
    for name, update in lora.updates.items():
        a, b = lora.weights.read(update.a), lora.weights.read(update.b)
        rest = update.scale * ranks[name] / alpha
        b = b if abs(rest - 1) < 1e-12 else b * np.float32(rest)
        # For embeddings llama.cpp takes rows of A, one per token.
        a, b = (a.T, b) if update.of_embeddings else (a, architecture.reorder(names[name], b))
        for letter, matrix in (("a", a), ("b", b)):
            if not np.isfinite(matrix).all():
                raise SaigaError(f"{lora.directory} contains NaN or infinity in {name}: the training diverged.")
            tensors[f"{names[name]}.lora_{letter}"] = np.ascontiguousarray(matrix)
    return alpha, tensors


def _write_lora(file: Path, architecture: str, name: str, alpha: float, tensors: dict[str, Array]) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor_name, tensor in tensors.items():
        writer.add_tensor(tensor_name, tensor)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _require_written(file: Path, tensors: dict[str, Array]) -> None:
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    if read.keys() != tensors.keys() or not all(np.array_equal(read[name], tensors[name]) for name in tensors):
        raise SaigaError(f"{file} does not contain what was written. The disk may be failing; run again.")


def to_safetensors(plan: MergePlan, output: str | Path, number_format: NumberFormat | None = None) -> Path:
    """Write the merged model as a directory that transformers loads; see `write_merged`."""
    require_absent(Path(output))
    merged = plan.merge()
    plan.require_same_base()
    return write_merged(merged, plan, Path(output), number_format)


def write_merged(merged: Merged, plan: MergePlan, directory: Path, number_format: NumberFormat | None = None) -> Path:
    """Write weights, index, config and tokenizer; without `number_format` each tensor keeps that of the base."""
    from safetensors.torch import save_file

    formats: dict[str, str] = {}
    for name in merged.shapes:
        stored = merged.base.float_stored(name if name in merged.base.stored else merged.names.embeddings)
        formats[name] = number_format or FLOATS[stored.dtype]
    sizes = {name: prod(shape) * (4 if formats[name] == "float32" else 2) for name, shape in merged.shapes.items()}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    workspace.require_disk(directory.parent, split.metadata["total_size"], f"The merged {plan.spec.name}")
    with replacing(directory) as partial:
        partial.mkdir()
        for file_name, names in split.filename_to_tensors.items():
            shard = ((name, _merge(merged, name, formats[name])) for name in names)
            try:
                save_file(dict(shard), partial / file_name, metadata={"format": "pt"})
            except safetensors.SafetensorError as error:  # as Python's functions would raise it, for `replacing`
                raise OSError(str(error)) from None
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(partial / "model.safetensors.index.json", index)
        _write_config(plan.base_dir / "config.json", partial / "config.json", merged, number_format)
        for name in _COPIED:
            places = (source / name for source in (plan.tokenizer_dir, plan.base_dir))
            if file := next(filter(Path.is_file, places), None):
                shutil.copyfile(file, partial / name)
        template = plan.read_tokenizer().chat_template
        (partial / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def _merge(merged: Merged, name: str, number_format: str) -> "torch.Tensor":
    """The complete tensor; in float32 only some rows at a time."""
    shape = merged.shapes[name]
    tensor = torch.empty(shape, dtype=getattr(torch, number_format))
    step = max(1, _CHUNK // prod(shape[1:]))
    for first in range(0, shape[0], step):
        rows = slice(first, min(first + step, shape[0]))
        tensor[rows] = torch.from_numpy(merged.read(name, rows))
    if not tensor.isfinite().all():
        raise SaigaError(
            f"A number of {name} is too large for float16, in which the base is stored. Export a GGUF (--format "
            "gguf), or call to_safetensors with number_format='bfloat16' in Python."
        )
    return tensor


def _write_config(source: Path, target: Path, merged: Merged, number_format: NumberFormat | None) -> None:
    config = json.loads(source.read_text(encoding="utf-8"))
    if number_format is not None:
        keys = {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}
        config |= dict.fromkeys(keys, number_format)
    if merged.is_untied:
        config["tie_word_embeddings"] = False
    if merged.vocabulary is not None:
        config.get("text_config", config)["vocab_size"] = merged.vocabulary
    _write_json(target, config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
