"""Base and adapters into a merged model in Hugging Face's form for other tools: shards of safetensors, streamed."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from saigakit import registry
from saigakit.core import manifest, workspace
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.weights import find, lineage
from saigakit.weights.adapter import EMBEDDINGS
from saigakit.weights.lineage import Lineage, MergeInto
from saigakit.weights.load import NumberFormat
from saigakit.weights.merge import Adapters, Merged

if TYPE_CHECKING:
    from saigakit.weights.tensors import Array

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
    manifest.require_absent(directory)
    base_dir = find.base_dir(spec, base_source)
    given = [adapters] if isinstance(adapters, Path) else [path for path, _ in adapters or ()]
    trained = Lineage.of(spec, given, merge_into)
    for adapter_dir in given:
        lineage.require_same_base(adapter_dir, base_dir)
    settings = trained.merging | ({"number_format": trained_in} if trained_in else {})
    merged = Merged.of(base_dir, adapters, **settings)
    shards = _planned(merged, number_format, shard_bytes)
    size = sum(tensor.bytes for shard in shards.values() for tensor in shard.values())
    workspace.require_disk(directory.parent, size, f"The merged {spec.name}")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
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
