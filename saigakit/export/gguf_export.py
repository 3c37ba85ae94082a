"""Export the merged model as GGUF files: check everything before the first byte, then stream."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Self

from saigakit.core import manifest, workspace
from saigakit.core.files import discard_abandoned, replacing, require_absent, sha256, sha256_of_text
from saigakit.core.lazy import gguf
from saigakit.errors import SaigaError
from saigakit.export.merge_plan import MergePlan
from saigakit.llamacpp import quantization, read_back, streaming, vocabulary
from saigakit.llamacpp.architecture import Architecture
from saigakit.llamacpp.imatrix import Importance
from saigakit.llamacpp.streaming import Written
from saigakit.llamacpp.vocabulary import Vocabulary
from saigakit.prompt import template
from saigakit.prompt.encoding import FastTokenizer
from saigakit.registry import SAMPLING_IN_GGUF, Sampling
from saigakit.weights import lineage
from saigakit.weights.merge import Merged
from saigakit.weights.tensors import Array, Shape

_COMPANIONS = 10**6  # bytes of the manifest, the pictures and the model card, at most


def output_files(file: Path, quant_types: Sequence[str]) -> dict[str, Path]:
    """By quant type, each once: `file` for the first one, FILE-TYPE.gguf for the others."""
    first, *further = dict.fromkeys(quant_types)
    return {first: file} | {each: file.with_name(f"{file.stem}-{each}{file.suffix}") for each in further}


@dataclass(frozen=True, kw_only=True)
class Export:
    """Everything that is decided before the first byte is written."""

    plan: MergePlan
    quant_types: Sequence[str]  # of `output_files`
    merged: Merged
    architecture: Architecture
    vocabulary: Vocabulary
    tokenizer: FastTokenizer
    shapes: Mapping[str, Shape]  # GGUF names, in the order of the file
    source_of: Mapping[str, str]  # GGUF name to the base's; a computed tensor has none
    importance: Importance | None = None
    importance_file: Path | None = None

    @classmethod
    def of(cls, plan: MergePlan, quant_types: Sequence[str], importance: str | Path | None = None) -> Self:
        """Read headers and the tokenizer. Raises SaigaError for anything that does not fit together."""
        for each in quant_types:
            quantization.require_known(each)
        merged, architecture = plan.merge(), Architecture.from_config(plan.base_dir)
        if merged.is_untied:
            architecture = replace(architecture, shape=replace(architecture.shape, tied=False))
        if merged.vocabulary is not None:
            if merged.vocabulary > architecture.shape.vocabulary and not plan.has_own_tokenizer:
                raise SaigaError(
                    f"The adapter was trained with {merged.vocabulary} tokens instead of the base's "
                    f"{architecture.shape.vocabulary}, and its tokenizer is not next to it. Give it as --tokenizer DIR."
                )
            architecture = architecture.resized(merged.vocabulary)
        source_of = architecture.source_names(merged.shapes)
        architecture.require_shapes(source_of, merged.shapes)
        shapes = {name: merged.shapes[source] for name, source in source_of.items()}
        shapes |= {name: tensor.shape for name, tensor in architecture.computed_tensors().items()}
        matrix = None if importance is None else Importance.read(importance)
        if matrix is not None:
            matrix.require_fit(shapes, str(importance))
        tokenizer = plan.read_tokenizer()
        return cls(
            plan=plan,
            quant_types=list(dict.fromkeys(quant_types)),
            merged=merged,
            architecture=architecture,
            vocabulary=Vocabulary.from_tokenizer(plan.tokenizer_dir, tokenizer, architecture.config),
            tokenizer=tokenizer,
            shapes={name: shapes[name] for name in quantization.sort_names(shapes)},
            source_of=source_of,
            importance=matrix,
            importance_file=None if importance is None else Path(importance),
        )

    def types(self, quant_type: str) -> dict[str, str]:
        """GGUF name to ggml type."""
        return quantization.tensor_types(
            self.shapes,
            quant_type,
            self.architecture.shape,
            self.architecture.kind.name,
            with_importance=self.importance is not None,
        )

    def bytes(self, quant_type: str) -> int:
        """The exact size of the complete file."""
        return streaming.total_bytes(self._metadata_bytes, self.shapes, self.types(quant_type))

    @cached_property
    def _metadata_bytes(self) -> int:
        """Measured on a file with only the vocabulary, from which llama.cpp must read the ids of the training."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "vocabulary.gguf"
            streaming.write_header(self._writer(file, self.quant_types[0]), {}, {})
            texts = [vocabulary.PROBE, *(text for text, _ in self.plan.spec.golden_ids)]
            if refused := vocabulary.compare_ids(file, self.tokenizer, texts):
                raise refused[0]
            return file.stat().st_size

    def require_room(self, directory: Path, finals: Iterable[Path] = ()) -> None:
        """Raises SaigaError if the disk or the memory is too small. Deletes what killed runs left of `finals`."""
        for final in finals:
            discard_abandoned(final)
        size = sum(map(self.bytes, self.quant_types)) + _COMPANIONS
        named = "GGUF" if len(self.quant_types) == 1 else "GGUF files"
        workspace.require_disk(directory, size, f"The {', '.join(self.quant_types)} {named} of {self.plan.spec.name}")
        workspace.require_memory(self.memory, "The export", "Close other programs or restart the notebook.")

    @property
    def memory(self) -> int:
        """Bytes held while the files are written."""
        return streaming.memory_needed(self.shapes, self.architecture.shape.head_dim, len(self.quant_types))

    def describe_base(self) -> str:
        if not self.merged.adapters:
            return "No adapter: only the base model is written."
        if self.merged.into == "original":
            return "The adapter is added to the published weights of the base."
        return "The adapter is added to the weights that it was trained on: the base in nf4, dequantised."

    def write(self, file: Path, texts: Sequence[str] = (), identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write `output_files` and read them back; none gets its name before all are right, with the ids of `texts`.

        Returns facts for a manifest; with `identity`, that manifest is written next to `file`.
        """
        finals, manifest_file = output_files(file, self.quant_types), manifest.path_for(file)
        self.require_room(file.parent, finals.values())
        with ExitStack() as stack:
            # Renamed in reverse: `file` first, the manifest last.
            manifest_partial = stack.enter_context(replacing(manifest_file)) if identity else None
            partials = {each: stack.enter_context(replacing(final)) for each, final in reversed(finals.items())}
            written = self._fill({each: partials[each] for each in finals})
            checks = [
                read_back.require_readable(partials[each], written[each], self.tokenizer, texts) for each in finals
            ]
            if identity and manifest_partial:
                outputs = {final.name: sha256(partials[each]) for each, final in finals.items()}
                manifest.write(manifest_partial, **identity, facts=self._facts(finals), outputs=outputs)
            for final in [*finals.values(), *([manifest_file] if identity else [])]:
                require_absent(final)
        for (each, final), check in zip(finals.items(), checks, strict=True):
            print(f"{final.name}: {each}, {self.bytes(each) / workspace.GB:.2f} GB. {check}", flush=True)
        return self._facts(finals)

    def _fill(self, files: Mapping[str, Path]) -> dict[str, list[Written]]:
        targets = []
        for quant_type, file in files.items():
            types = self.types(quant_type)
            start = streaming.write_header(self._writer(file, quant_type), self.shapes, types)
            targets.append(streaming.Target(file, types, start))
        head_dim = self.architecture.shape.head_dim
        written = streaming.write_tensors(
            targets, self.shapes, self.read, row_multiple=head_dim, importance=self.importance
        )
        return dict(zip(files, written, strict=True))

    def _facts(self, files: Mapping[str, Path]) -> dict[str, Any]:
        by_name = {}
        for quant_type, file in files.items():
            size = self.bytes(quant_type)
            bits = round(8 * size / self._parameters, 3)
            facts = {"quant_type": quant_type, "bytes": size, "bits_per_weight": bits, "tensors": len(self.shapes)}
            by_name[file.name] = facts
        hashes = {
            "chat_template_sha256": sha256_of_text(self.tokenizer.chat_template),
            "vocabulary_sha256": sha256_of_text("\0".join(text for text, _, _ in self.vocabulary.tokens)),
        }
        return {**next(iter(by_name.values())), "files": by_name, **hashes}

    @property
    def _parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    def read(self, name: str, rows: slice) -> Array:
        """`rows` must hold complete heads, which llama.cpp orders differently."""
        if name not in self.source_of:
            return self.architecture.computed_tensors()[name][rows]
        return self.architecture.convert(name, self.merged.read(self.source_of[name], rows))

    def _writer(self, file: Path, quant_type: str) -> "gguf.GGUFWriter":
        """With all metadata; the two keys that llama.cpp's quantiser rewrites come last, where it leaves them."""
        spec, writer = self.plan.spec, gguf.GGUFWriter(file, self.architecture.kind.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(spec.name).name)
        writer.add_size_label(gguf.size_label(self._parameters, self._parameters, 0, 0))
        writer.add_license(spec.licence)
        sampling = Sampling.of(spec, self.plan.base_dir)
        for ours, name in SAMPLING_IN_GGUF.items():
            getattr(writer, f"add_sampling_{name}")(getattr(sampling, ours))
        self.architecture.write_metadata(writer)
        self.vocabulary.write_metadata(writer)
        writer.add_chat_template(template.for_inference(self.tokenizer.chat_template))
        if (system_prompt := self.plan.lineage.system_prompt) is not None:
            writer.add_string(lineage.SYSTEM_PROMPT_KEY, system_prompt)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        named = "ALL_F32" if quant_type == "F32" else f"MOSTLY_{quant_type}"
        writer.add_file_type(gguf.LlamaFileType[named])
        if self.importance is not None and self.importance_file is not None:
            self.importance.write_metadata(writer, self.importance_file)
        return writer
