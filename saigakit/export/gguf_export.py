"""Base, adapters and settings into GGUF files: everything is decided before the first byte, then streamed."""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saigakit.core import manifest, workspace
from saigakit.core.display import Table
from saigakit.core.files import discard_partial, replacing, require_absent, sha256
from saigakit.export import plan
from saigakit.llamacpp import container, quantization, read_back, streaming, vocabulary
from saigakit.llamacpp.architecture import Architecture
from saigakit.llamacpp.imatrix import Importance
from saigakit.llamacpp.streaming import Written
from saigakit.llamacpp.vocabulary import Vocabulary
from saigakit.prompt import encoding, template
from saigakit.prompt.encoding import FastTokenizer
from saigakit.registry import ModelSpec
from saigakit.weights import find, lineage
from saigakit.weights.lineage import Lineage, MergeInto
from saigakit.weights.merge import Adapters, Merged

if TYPE_CHECKING:
    import gguf
    from matplotlib.figure import Figure

    from saigakit.weights.tensors import Array, Shape


def paths(file: Path, quant_types: Sequence[str]) -> dict[str, Path]:
    """By quant type, each once: the first is `file`, and of every further one there is a file beside it."""
    first, *further = dict.fromkeys(quant_types)
    return {first: file} | {each: file.with_name(f"{file.stem}-{each}{file.suffix}") for each in further}


@dataclass(frozen=True, kw_only=True)
class Export:
    """Everything that is decided before the first byte is written."""

    spec: ModelSpec
    quant_types: Sequence[str]  # the first is that of the file that is named
    system_prompt: str | None
    base_dir: Path
    merged: Merged
    architecture: Architecture
    vocabulary: Vocabulary
    tokenizer: FastTokenizer
    shapes: Mapping[str, "Shape"]  # GGUF names, in the order of the file
    source_of: Mapping[str, str]  # GGUF name to the base's; a computed tensor has none
    importance: Importance | None = None
    importance_file: Path | None = None

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        adapters: Adapters,
        base_source: str | None,
        quant_type: str,
        merge_into: MergeInto = "auto",
        importance: str | Path | None = None,
        quant_types: Sequence[str] = (),
    ) -> Self:
        """Reads headers and the tokenizer. Raises SaigaError for all that does not fit together."""
        chosen = list(dict.fromkeys([quant_type, *quant_types]))
        for each in chosen:
            quantization.require_known(each)
        given = [adapters] if isinstance(adapters, Path) else [directory for directory, _ in adapters or ()]
        trained = Lineage.of(spec, given, merge_into)
        base_dir = find.base_dir(spec, base_source)
        architecture = Architecture.of(base_dir)
        merged = Merged.of(base_dir, adapters, **trained.merging)
        architecture = architecture.untied() if merged.is_untied else architecture
        source_of = architecture.sources(merged.shapes)
        architecture.require_shapes(source_of, merged.shapes)
        shapes = {name: merged.shapes[source] for name, source in source_of.items()}
        shapes |= {name: tensor.shape for name, tensor in architecture.computed().items()}
        matrix = None if importance is None else Importance.of_file(importance)
        if matrix is not None:
            matrix.require_fit(shapes, str(importance))
        tokenizer = encoding.load_tokenizer(spec.name, base_source)
        return cls(
            spec=spec,
            quant_types=chosen,
            system_prompt=trained.system_prompt,
            base_dir=base_dir,
            merged=merged,
            architecture=architecture,
            vocabulary=Vocabulary.of(find.tokenizer_dir(spec, base_source), tokenizer, architecture.config),
            tokenizer=tokenizer,
            shapes={name: shapes[name] for name in quantization.in_order(shapes)},
            source_of=source_of,
            importance=matrix,
            importance_file=None if importance is None else Path(importance),
        )

    def types(self, quant_type: str) -> dict[str, str]:
        return quantization.tensor_types(
            self.shapes,
            quant_type,
            self.architecture.shape,
            self.architecture.kind.name,
            with_importance=self.importance is not None,
        )

    def bytes(self, quant_type: str) -> int:
        """Of the whole file, exactly."""
        return container.total_bytes(self._metadata_bytes, self.shapes, self.types(quant_type))

    @cached_property
    def _metadata_bytes(self) -> int:
        """The vocabulary is written alone and read by llama.cpp, which must give the ids of the training."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "vocabulary.gguf"
            container.write_header(self._writer(file, self.quant_types[0]), {}, {})
            vocabulary.require_same_ids(file, self.tokenizer, [text for text, _ in self.spec.golden_ids])
            return file.stat().st_size

    def require_room(self, directory: Path) -> None:
        """Raises SaigaError where the disk or the memory is too small; the size of all files is known exactly."""
        size = sum(map(self.bytes, self.quant_types))
        named = "GGUF" if len(self.quant_types) == 1 else "GGUF files"
        workspace.require_disk(directory, size, f"The {', '.join(self.quant_types)} {named} of {self.spec.name}")
        workspace.require_memory(self._memory, "The export", "Close other programs or restart the notebook.")

    @property
    def _memory(self) -> int:
        """Bytes that are held while the files are written."""
        return streaming.memory(self.shapes, self.architecture.shape.head_dim, len(self.quant_types))

    def plan(self) -> Table:
        """What is read and written, and about how long it takes, measured on a sample."""
        return plan.plan(
            {quant_type: (self.types(quant_type), self.bytes(quant_type)) for quant_type in self.quant_types},
            self.shapes,
            self.merged.base,
            self._memory,
            self._read,
        )

    @property
    def said_of_base(self) -> str:
        if not self.merged.adapters:
            return "No adapter: the base alone is written."
        if self.merged.into == "original":
            return "The adapter is added to the weights of the base as they were published."
        return "The adapter is added to the weights that it was trained on: the base in nf4, dequantised."

    def write(self, file: Path, texts: Sequence[str] = (), identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write `file` and one file for each further type; they get their names when all are complete.

        They are read back: llama.cpp must load them, and `texts` must give the ids of the training. Returns what a
        manifest says of them; with `identity`, which it begins with, there is one next to `file`.
        """
        finals, told = paths(file, self.quant_types), manifest.path_for(file)
        self.discard_partials(file)
        self.require_room(file.parent)
        with ExitStack() as stack:
            # Renamed in reverse: `file` first, the manifest last.
            told_partial = stack.enter_context(replacing(told)) if identity else None
            partials = {each: stack.enter_context(replacing(final)) for each, final in reversed(finals.items())}
            written = self._fill({each: partials[each] for each in finals})
            said = [self._require_readable(each, partials[each], written[each], texts) for each in self.quant_types]
            if identity and told_partial:
                outputs = {final.name: sha256(partials[each]) for each, final in finals.items()}
                manifest.write(told_partial, **identity, facts=self._facts_of(finals), outputs=outputs)
            for final in [*finals.values(), *([told] if identity else [])]:
                require_absent(final)
        for (each, final), sentence in zip(finals.items(), said, strict=True):
            print(f"{final.name}: {each}, {self.bytes(each) / workspace.GB:.2f} GB. {sentence}", flush=True)
        return self._facts_of(finals)

    def _facts_of(self, files: Mapping[str, Path]) -> dict[str, Any]:
        facts = {files[each].name: self._facts(each) for each in self.quant_types}
        return {
            **facts[files[self.quant_types[0]].name],
            "files": facts,
            "chat_template_sha256": hashlib.sha256(self.tokenizer.chat_template.encode("utf-8")).hexdigest(),
        }

    def discard_partials(self, file: Path) -> None:
        """Remove what a killed run left of the files of `write`: the space is needed."""
        for final in paths(file, self.quant_types).values():
            discard_partial(final)

    def _fill(self, files: Mapping[str, Path]) -> dict[str, list[Written]]:
        targets = []
        for quant_type, file in files.items():
            types = self.types(quant_type)
            start = container.write_header(self._writer(file, quant_type), self.shapes, types)
            targets.append(streaming.Target(file, types, start))
        head = self.architecture.shape.head_dim
        written = streaming.fill(targets, self.shapes, self._read, whole_rows=head, importance=self.importance)
        return dict(zip(files, written, strict=True))

    def _require_readable(self, quant_type: str, file: Path, written: Sequence[Written], texts: Sequence[str]) -> str:
        types = self.types(quant_type)
        container.require_whole(file, self.shapes, types, self.bytes(quant_type))
        wanted = {key: value.value for key, value in self._writer(file, quant_type).kv_data[0].items()}
        read_back.require_tensors(file, wanted, self.shapes, types)
        read_back.require_written(file, written)
        return read_back.require_readable(file, len(self.shapes), self.tokenizer, texts)

    def _facts(self, quant_type: str) -> dict[str, Any]:
        size = self.bytes(quant_type)
        bits = round(8 * size / self._parameters, 3)
        return {"quant_type": quant_type, "bytes": size, "bits_per_weight": bits, "tensors": len(self.shapes)}

    @property
    def _parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    def _read(self, name: str, rows: slice) -> "Array":
        """Rows of whole heads, in llama.cpp's order."""
        if name not in self.source_of:
            return self.architecture.computed()[name][rows]
        return self.architecture.converted(name, self.merged.read(self.source_of[name], rows))

    def _writer(self, file: Path, quant_type: str) -> "gguf.GGUFWriter":
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
            writer.add_string(lineage.SYSTEM_PROMPT_KEY, self.system_prompt)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        named = "ALL_F32" if quant_type == "F32" else f"MOSTLY_{quant_type}"
        writer.add_file_type(gguf.LlamaFileType[named])
        if self.importance is not None and self.importance_file is not None:
            self.importance.describe(writer, self.importance_file)
        return writer

    def plot(self) -> "Figure":
        """The sizes that this model has or could have."""
        adapters = [adapter.weights.bytes_on_disk for adapter, _ in self.merged.adapters]
        return plan.plot_sizes(
            self.merged.base.bytes_on_disk,
            sum(adapters) if adapters else None,
            {quant_type: self.bytes(quant_type) for quant_type in quantization.QUANT_TYPES},
            self.quant_types[0],
        )
