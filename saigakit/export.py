"""A base model and an adapter into one quantised GGUF file, tensor by tensor: no merged copy on the way."""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saigakit import (
    container,
    manifest,
    models,
    quantization,
    sizes,
    sources,
    template,
    tokenization,
    vocabulary,
    workspace,
)
from saigakit.architecture import Architecture
from saigakit.errors import SaigaError
from saigakit.merge import Merged
from saigakit.models import ModelSpec
from saigakit.tokenization import FastTokenizer
from saigakit.vocabulary import Vocabulary

if TYPE_CHECKING:
    import gguf
    from matplotlib.figure import Figure

    from saigakit.shards import Array, Shape

STAGE = "03_merge_gguf"
_WEIGHTS = (".safetensors", ".bin")
SYSTEM_PROMPT_KEY = "saigakit.system_prompt"  # no key of llama.cpp's: what a conversation begins with by default


def merge_gguf(
    *,
    model: str,
    run_dir: str | Path,
    adapter: str | None = "02_train",
    base_source: str | None = None,
    quant_type: str = "Q4_K_M",
) -> Path:
    """The stage 03_merge_gguf: model.gguf and sizes.png in `run_dir`/03_merge_gguf.

    Raises SaigaError in the first seconds where the files do not fit each other or the disk.
    """
    spec = models.find(model)
    adapter_dir = None if adapter is None else sources.adapter_dir(spec, adapter, run_dir)
    export = Export.of(spec, adapter_dir, base_source, quant_type)
    final = Path(run_dir) / STAGE
    if not final.exists():
        export.require_room(final)  # before gigabytes are hashed
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {"model": model, "base_source": base_source, "adapter": adapter, "quant_type": quant_type},
        "inputs": {
            "base": manifest.hashes(export.base_dir),
            "adapter": None if adapter_dir is None else manifest.hashes(adapter_dir),
        },
    }
    if adapter_dir is not None:
        _require_same_base(adapter_dir, export.base_dir, identity["inputs"]["base"])
    if manifest.is_kept(final, **identity):
        return final
    facts: dict[str, Any] = {}
    with manifest.making(final, facts=facts, **identity) as partial:
        facts |= export.write(partial / "model.gguf")
        export.plot().savefig(partial / "sizes.png", dpi=110)
    return final


def _require_same_base(adapter_dir: Path, base_dir: Path, base: Mapping[str, str]) -> None:
    """Of the same weights that the adapter was trained on, where its manifest tells."""
    if not (adapter_dir / manifest.NAME).is_file():
        return
    trained_on = manifest.read(adapter_dir)["inputs"].get("base", base)
    weights = [{digest for name, digest in files.items() if name.endswith(_WEIGHTS)} for files in (trained_on, base)]
    if weights[0] != weights[1]:
        raise SaigaError(
            f"The adapter in {adapter_dir} was trained on other weights than those in {base_dir}. "
            "Give base_source as in 02_train, or train again."
        )


def to_gguf(
    *,
    model: str,
    adapter: str | Path | None,
    output: str | Path,
    quant_type: str = "Q4_K_M",
    base_source: str | None = None,
) -> Path:
    """The GGUF alone, without a stage. Raises SaigaError where `output` is there already."""
    file, spec = Path(output), models.find(model)
    if file.exists():
        raise SaigaError(f"{file} is there already; nothing was overwritten. Delete it or choose another name.")
    adapter_dir = None if adapter is None else sources.adapter_dir(spec, str(adapter))
    Export.of(spec, adapter_dir, base_source, quant_type).write(file)
    return file


@dataclass(frozen=True, kw_only=True)
class Export:
    """Everything that is decided before the first byte is written."""

    spec: ModelSpec
    quant_type: str
    system_prompt: str | None  # that of the training records, else the model's own
    base_dir: Path
    merged: Merged
    architecture: Architecture
    vocabulary: Vocabulary
    tokenizer: FastTokenizer
    shapes: Mapping[str, "Shape"]  # GGUF names, in the order of the file
    source_of: Mapping[str, str]  # GGUF name to the base's; a computed tensor has none

    @classmethod
    def of(cls, spec: ModelSpec, adapter_dir: Path | None, base_source: str | None, quant_type: str) -> Self:
        """Reads headers and the tokenizer. Raises SaigaError for all that does not fit together."""
        quantization.require_known(quant_type)
        system_prompt = spec.system_prompt
        if adapter_dir is not None and (adapter_dir / manifest.NAME).is_file():
            trained = manifest.require_stage(adapter_dir, "02_train", model=spec.name)
            system_prompt = trained.get("system_prompt") or system_prompt
        base_dir = sources.base_dir(spec, base_source)
        architecture = Architecture.of(base_dir)
        merged = Merged.of(base_dir, adapter_dir)
        source_of = architecture.sources(merged.shapes)
        architecture.require_shapes(source_of, merged.shapes)
        shapes = {name: merged.shapes[source] for name, source in source_of.items()}
        shapes |= {name: tensor.shape for name, tensor in architecture.computed().items()}
        tokenizer = tokenization.load_tokenizer(spec.name, base_source)
        return cls(
            spec=spec,
            quant_type=quant_type,
            system_prompt=system_prompt,
            base_dir=base_dir,
            merged=merged,
            architecture=architecture,
            vocabulary=Vocabulary.of(sources.tokenizer_dir(spec, base_source), tokenizer, architecture.config),
            tokenizer=tokenizer,
            shapes={name: shapes[name] for name in quantization.in_order(shapes)},
            source_of=source_of,
        )

    def types(self, quant_type: str) -> dict[str, str]:
        return quantization.tensor_types(self.shapes, quant_type, self.architecture.shape, self.architecture.kind.name)

    def bytes(self, quant_type: str) -> int:
        """Of the whole file, exactly."""
        return container.total_bytes(self._metadata_bytes, self.shapes, self.types(quant_type))

    @cached_property
    def _metadata_bytes(self) -> int:
        """The vocabulary is written alone and read by llama.cpp, which must give the ids of the training."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "vocabulary.gguf"
            container.write(self._writer(file), {}, {}, self._read)
            vocabulary.require_same_ids(file, self.tokenizer, [text for text, _ in self.spec.golden_ids])
            return file.stat().st_size

    def require_room(self, directory: Path) -> None:
        """Raises SaigaError where the disk or the memory is too small; the file's size is known exactly."""
        size = self.bytes(self.quant_type)
        workspace.require_disk(directory, size, f"The {self.quant_type} GGUF of {self.spec.name}")
        types = self.types(self.quant_type)
        # float32, the adapter's update, a byte for each number (is it finite?), and the result.
        largest = max(
            prod(shape) * (9 if self.merged.is_adapted(self.source_of.get(name, "")) else 5)
            + quantization.size(shape, types[name])
            for name, shape in self.shapes.items()
        )
        workspace.require_memory(largest, "The largest tensor", "Close other programs or restart the notebook.")

    def write(self, file: Path) -> dict[str, Any]:
        """Makes `file`, written beside and renamed; returns what a manifest says of it."""
        self.require_room(file.parent)
        types, size = self.types(self.quant_type), self.bytes(self.quant_type)
        partial = file.with_name(f".{file.name}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            container.write(self._writer(partial), self.shapes, types, self._read)
            container.require_whole(partial, self.shapes, types, size)
            partial.rename(file)
        except OSError as error:
            raise SaigaError(f"{file} could not be written: {error}.") from None
        finally:
            partial.unlink(missing_ok=True)
        bits = 8 * size / self._parameters
        print(
            f"{file.name}: {size / workspace.GB:.2f} GB, {bits:.2f} bits per weight, {len(types)} tensors.", flush=True
        )
        return {
            "bytes": size,
            "bits_per_weight": round(bits, 3),
            "tensors": len(types),
            "chat_template_sha256": hashlib.sha256(self.tokenizer.chat_template.encode("utf-8")).hexdigest(),
        }

    @property
    def _parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    def _read(self, name: str) -> "Array":
        if name not in self.source_of:
            return self.architecture.computed()[name]
        return self.architecture.reordered(name, self.merged.read(self.source_of[name]))

    def _writer(self, file: Path) -> "gguf.GGUFWriter":
        """With all metadata; the two keys that llama.cpp's quantiser rewrites come last, where it leaves them."""
        import gguf

        writer = gguf.GGUFWriter(file, self.architecture.kind.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(self.spec.name).name)
        writer.add_size_label(gguf.size_label(self._parameters, self._parameters, 0, 0))
        writer.add_license(self.spec.licence)
        sampling = self.spec.sampling
        writer.add_sampling_top_k(sampling.top_k)
        writer.add_sampling_top_p(sampling.top_p)
        writer.add_sampling_temp(sampling.temperature)
        writer.add_sampling_penalty_repeat(sampling.repeat_penalty)
        self.architecture.describe(writer)
        self.vocabulary.describe(writer)
        writer.add_chat_template(template.for_inference(self.tokenizer.chat_template))
        if self.system_prompt is not None:
            writer.add_string(SYSTEM_PROMPT_KEY, self.system_prompt)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        named = "ALL_F32" if self.quant_type == "F32" else f"MOSTLY_{self.quant_type}"
        writer.add_file_type(gguf.LlamaFileType[named])
        return writer

    def plot(self) -> "Figure":
        """The sizes that this model has or could have."""
        adapter = self.merged.adapter
        return sizes.plot(
            self.merged.base.bytes_on_disk,
            None if adapter is None else adapter.weights.bytes_on_disk,
            {quant_type: self.bytes(quant_type) for quant_type in quantization.QUANT_TYPES},
            self.quant_type,
        )
