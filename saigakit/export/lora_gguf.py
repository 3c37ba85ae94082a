"""A LoRA adapter into a small GGUF file that llama.cpp adds to the base model's GGUF when it loads: no merge."""

from pathlib import Path
from typing import TYPE_CHECKING

from saigakit import registry
from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.llamacpp.architecture import Architecture
from saigakit.weights import find, lineage
from saigakit.weights.adapter import EMBEDDINGS, Adapter
from saigakit.weights.lineage import Lineage
from saigakit.weights.merge import Merged

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
    manifest.require_absent(file)
    base_dir, adapter_dir = find.base_dir(spec, base_source), find.adapter_dir(spec, str(adapter))
    architecture = Architecture.of(base_dir)
    Lineage.of(spec, [adapter_dir], "original")
    lineage.require_same_base(adapter_dir, base_dir)
    merged = Merged.of(base_dir, adapter_dir)
    (lora, _), *_ = merged.adapters
    _require_holdable(merged, lora)
    places = {source: name for name, source in architecture.sources(merged.shapes).items()}
    if lost := sorted(set(lora.updates) - set(places)):
        raise SaigaError(f"{adapter_dir} changes {lost[0]}, which a {architecture.kind.name} GGUF has no place for.")
    alpha, tensors = _tensors(lora, architecture, places)
    with manifest.whole_file(file) as partial:
        _write(partial, architecture.kind.name, adapter_dir.name, alpha, tensors)
        _require_whole(partial, tensors)
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
        a, b = (a.T, b) if name == EMBEDDINGS else (a, architecture.reordered(places[name], b))
        for letter, matrix in (("a", a), ("b", b)):
            if not np.isfinite(matrix).all():
                raise SaigaError(f"{lora.directory} holds NaN or infinity in {name}: the training diverged.")
            tensors[f"{places[name]}.lora_{letter}"] = np.ascontiguousarray(matrix)
    return alpha, tensors


def _write(file: Path, architecture: str, name: str, alpha: float, tensors: "dict[str, Array]") -> None:
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


def _require_whole(file: Path, tensors: "dict[str, Array]") -> None:
    import gguf
    import numpy as np

    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    if read.keys() != tensors.keys() or not all(np.array_equal(read[name], tensors[name]) for name in tensors):
        raise SaigaError(f"{file} came out wrong: other tensors than written. The disk may be failing; run again.")
