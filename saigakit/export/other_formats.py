"""Export the adapter alone as a GGUF, or the merged model as safetensors."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from saigakit import registry
from saigakit.core import workspace
from saigakit.core.files import discard_partial, replacing, require_absent
from saigakit.errors import SaigaError
from saigakit.llamacpp.architecture import Architecture
from saigakit.prompt import encoding
from saigakit.weights import find, lineage
from saigakit.weights.adapter import EMBEDDINGS, Adapter
from saigakit.weights.lineage import Lineage, MergeInto
from saigakit.weights.load import NumberFormat
from saigakit.weights.merge import Adapters, Merged

if TYPE_CHECKING:
    from saigakit.weights.tensors import Array

_ROWS = 4096  # of a stored copy that are compared at a time
_ROUNDING = 2.0**-7  # of bfloat16, twice over: a copy may be of another number format than the base


def to_lora_gguf(*, model: str, adapter: str | Path, output: str | Path, base_source: str | None = None) -> Path:
    """The adapter in float32, for `lora_path` of llama-cpp-python and --lora of llama.cpp's programs.

    Raises SaigaError where `output` is there already, for the adapter of another base, and for what the format cannot
    hold: that must be merged.
    """
    file, spec = Path(output), registry.find(model)
    require_absent(file)
    base_dir, adapter_dir = find.base_dir(spec, base_source), find.adapter_dir(spec, str(adapter))
    architecture = Architecture.from_config(base_dir)
    Lineage.read(spec, [adapter_dir], "original")
    lineage.require_same_base(adapter_dir, base_dir)
    merged = Merged.open(base_dir, adapter_dir)
    (lora, _), *_ = merged.adapters
    _require_holdable(merged, lora)
    places = {source: name for name, source in architecture.source_names(merged.shapes).items()}
    if lost := sorted(set(lora.updates) - set(places)):
        raise SaigaError(f"{adapter_dir} changes {lost[0]}, which a {architecture.kind.name} GGUF has no place for.")
    alpha, tensors = _tensors(lora, architecture, places)
    with replacing(file) as partial:
        _write_lora(partial, architecture.kind.name, adapter_dir.name, alpha, tensors)
        _require_whole_lora(partial, tensors)
    return file


def _require_holdable(merged: Merged, lora: Adapter) -> None:
    remedy = "Merge it instead (03_merge_gguf, or to_gguf)."
    beyond = None
    if any(update.magnitude for update in lora.updates.values()):
        beyond = "DoRA (use_dora)"
    elif lora.trained:
        beyond = f"whole trained modules (modules_to_save): {', '.join(sorted(lora.trained))}"
    elif lora.biases:
        beyond = "LoRA biases (lora_bias)"
    elif merged.is_untied:
        beyond = "LoRA on embeddings or head of a base that uses one matrix for both (tied)"
    else:
        beyond = next((f"another {name} than the base" for name in lora.copies if _differs(merged, lora, name)), None)
    if beyond is not None:
        raise SaigaError(f"{lora.directory} uses {beyond}, and a LoRA GGUF holds low-rank matrices alone. {remedy}")


def _differs(merged: Merged, lora: Adapter, name: str) -> bool:
    """Whether the copy of a base's tensor is another one, and not only rounded."""
    import numpy as np

    for first in range(0, merged.base.stored[name].shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        ours, theirs = lora.weights.read(lora.copies[name], rows), merged.base.read(name, rows)
        if not np.allclose(ours, theirs, rtol=_ROUNDING, atol=1e-7):
            return True
    return False


def _tensors(lora: Adapter, architecture: Architecture, places: dict[str, str]) -> "tuple[float, dict[str, Array]]":
    """llama.cpp scales by alpha / rank with one alpha; where that is not the scale, B carries the rest."""
    import numpy as np

    ranks = {name: lora.weights.stored[update.a].shape[0] for name, update in lora.updates.items()}
    first = next(iter(lora.updates))
    alpha = lora.updates[first].scale * ranks[first]
    tensors: dict[str, Array] = {}
    for name, update in lora.updates.items():
        a, b = lora.weights.read(update.a), lora.weights.read(update.b)
        rest = update.scale * ranks[name] / alpha
        b = b if abs(rest - 1) < 1e-12 else b * np.float32(rest)
        # Of the embeddings llama.cpp takes rows of A, one per token.
        a, b = (a.T, b) if name == EMBEDDINGS else (a, architecture.reorder(places[name], b))
        for letter, matrix in (("a", a), ("b", b)):
            if not np.isfinite(matrix).all():
                raise SaigaError(f"{lora.directory} holds NaN or infinity in {name}: the training diverged.")
            tensors[f"{places[name]}.lora_{letter}"] = np.ascontiguousarray(matrix)
    return alpha, tensors


def _write_lora(file: Path, architecture: str, name: str, alpha: float, tensors: "dict[str, Array]") -> None:
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor_name, tensor in tensors.items():
        writer.add_tensor(tensor_name, tensor)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _require_whole_lora(file: Path, tensors: "dict[str, Array]") -> None:
    import gguf
    import numpy as np

    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    if read.keys() != tensors.keys() or not all(np.array_equal(read[name], tensors[name]) for name in tensors):
        raise SaigaError(f"{file} came out wrong: other tensors than written. The disk may be failing; run again.")


_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_CHUNK = 1 << 24  # numbers that are merged at a time
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def to_safetensors(
    *,
    model: str,
    adapters: Adapters,
    output: str | Path,
    base_source: str | None = None,
    number_format: NumberFormat | None = None,
    merge_into: MergeInto = "auto",
    trained_in: NumberFormat | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """A directory that transformers loads: weights, index, config and tokenizer.

    `number_format` is that of each tensor of the base where it is None; `trained_in` is what the adapter's manifest
    tells, and matters for merge_into='dequantized' alone. Raises SaigaError where `output` is there already, the disk
    is too small, the adapters do not fit, or a number is too large for float16.
    """
    directory, spec = Path(output), registry.find(model)
    require_absent(directory)
    base_dir = find.base_dir(spec, base_source)
    given = [adapters] if isinstance(adapters, Path) else [path for path, _ in adapters or ()]
    trained = Lineage.read(spec, given, merge_into)
    for adapter_dir in given:
        lineage.require_same_base(adapter_dir, base_dir)
    settings = trained.merging | ({"number_format": trained_in} if trained_in else {})
    merged = Merged.open(base_dir, adapters, **settings)
    shards = _planned(merged, number_format, shard_bytes)
    size = sum(tensor.bytes for shard in shards.values() for tensor in shard.values())
    workspace.require_disk(directory.parent, size, f"The merged {spec.name}")
    partial = discard_partial(directory)
    partial.mkdir(parents=True)
    try:
        for name, shard in shards.items():
            _write_shard(partial / name, merged, shard)
        if len(shards) > 1:
            index = {tensor: name for name, shard in shards.items() for tensor in shard}
            _write_json(
                partial / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index}
            )
        _write_config(base_dir / "config.json", partial / "config.json", merged, number_format)
        _copy_tokenizer(base_dir, find.tokenizer_dir(spec, base_source), partial)
        template = encoding.load_tokenizer(spec.name, base_source).chat_template
        (partial / "chat_template.jinja").write_text(template, encoding="utf-8")
        partial.rename(directory)
    except OSError as error:
        raise SaigaError(f"{directory} could not be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


@dataclass(frozen=True)
class _Planned:
    """A tensor of a shard."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtype]


def _planned(merged: Merged, number_format: NumberFormat | None, shard_bytes: int) -> dict[str, dict[str, _Planned]]:
    """File name to its tensors, in the order of the base."""
    shards: list[dict[str, _Planned]] = [{}]
    room = shard_bytes
    for name, shape in merged.shapes.items():
        stored = merged.base.float_stored(name if name in merged.base.stored else EMBEDDINGS)
        tensor = _Planned(shape, _TYPES[number_format] if number_format else stored.dtype)
        if shards[-1] and tensor.bytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{index:05d}-of-{len(shards):05d}.safetensors": shard for index, shard in enumerate(shards, 1)}


def _write_shard(file: Path, merged: Merged, tensors: Mapping[str, _Planned]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name, tensor in tensors.items():
            for part in _parts(merged, name, tensor.shape):
                _write_numbers(stream, name, part, tensor.dtype)


def _parts(merged: Merged, name: str, shape: tuple[int, ...]) -> "Iterator[Array]":
    """The merged tensor, some rows at a time."""
    if len(shape) < 2:
        yield merged.read(name)
        return
    step = max(1, _CHUNK // prod(shape[1:]))
    for first in range(0, shape[0], step):
        yield merged.read(name, slice(first, min(first + step, shape[0])))


def _write_numbers(stream: BinaryIO, name: str, numbers: "Array", dtype: str) -> None:
    import torch

    made = torch.from_numpy(numbers)
    if dtype != "F32":
        made = made.to(torch.float16 if dtype == "F16" else torch.bfloat16)
        if not bool(made.isfinite().all()):
            raise SaigaError(
                f"A number of {name} is too large for float16, in which the base is stored. Export a GGUF (--format "
                "gguf), or in Python give to_safetensors number_format='bfloat16'."
            )
        made = made.view(torch.int16)
    stream.write(made.contiguous().numpy().tobytes())


def _write_config(source: Path, target: Path, merged: Merged, number_format: NumberFormat | None) -> None:
    config = json.loads(source.read_text(encoding="utf-8"))
    if number_format is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = number_format
        config.setdefault("torch_dtype" if "dtype" not in config else "dtype", number_format)
    if merged.is_untied:
        config["tie_word_embeddings"] = False
    _write_json(target, config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(base_dir: Path, tokenizer_dir: Path, target: Path) -> None:
    for name in _COPIED:
        for directory in (tokenizer_dir, base_dir):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, target / name)
                break
