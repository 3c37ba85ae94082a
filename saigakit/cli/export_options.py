"""Run `saigakit export`: GGUF files with their companion files, a LoRA GGUF or a merged model."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saigakit import export as exporting
from saigakit import registry
from saigakit.core import manifest
from saigakit.core.files import require_absent
from saigakit.errors import SaigaError
from saigakit.export import calibration, gguf_export, model_card, modelfile, other_formats
from saigakit.export.merge_plan import MergePlan
from saigakit.llamacpp import quantization

_MATRIX_SUFFIXES = (".gguf", ".dat", ".imatrix")
_OF_PLAN = ("base_source", "merge_into", "tokenizer", "chat_template")
_Weighted = list[tuple[str, float]]  # adapters with their weights


def export(*, file_format: str, adapters: Sequence[str], **options: Any) -> list[str]:  # noqa: ANN401
    """Return the lines to print. `adapters`: PATH or PATH:WEIGHT; `options`: the others of the command."""
    weighted = [_parse_weighted(each) for each in adapters]
    quant_types, importance = options.pop("quant_types"), options.pop("importance")
    given = {name: value for name, value in options.items() if value}
    if file_format == "gguf":
        return _export_gguf(weighted, quant_types or ("Q4_K_M",), importance, given)
    only_gguf = {"quant-type": quant_types, "importance": importance}
    only_merged = {name.replace("_", "-"): given.get(name) for name in _OF_PLAN[1:]}
    not_taken = only_gguf | (only_merged if file_format == "lora" else {})
    if unused := [name for name, value in not_taken.items() if value]:
        raise SaigaError(f"--format {file_format} does not take --{unused[0]}.")
    if file_format == "safetensors":
        return [f"model: {other_formats.to_safetensors(_plan(weighted, given), given['output'])} (for transformers)"]
    if len(weighted) != 1 or weighted[0][1] != 1:
        raise SaigaError("--format lora takes one --adapter, without a weight.")
    made = other_formats.to_lora_gguf(adapter=weighted[0][0], **given)
    return [f"adapter: {_with_size(made)}; in llama.cpp, with a GGUF of the base: --lora {shlex.quote(str(made))}"]


def _export_gguf(
    weighted: _Weighted, quant_types: Sequence[str], importance: str | None, given: dict[str, Any]
) -> list[str]:
    output = Path(given["output"])
    if output.suffix != ".gguf":
        raise SaigaError(f"--output {output}: the name of a GGUF file ends with .gguf.")
    modelfile.require_name(output.name)
    for each in quant_types:
        quantization.require_known(each)
    prefix = f"{output.stem}."
    companions = model_card.companion_paths(output.parent, prefix)
    adapter = weighted[0][0] if len(weighted) == 1 and weighted[0][1] == 1 else weighted or None
    finals = gguf_export.output_files(output, quant_types)
    # A full disk may have kept the last files from being written.
    is_made = output.is_file() and manifest.path_for(output).is_file()
    completes = is_made and not all(file.exists() for file in companions.values())
    for file in () if completes else (*finals.values(), *companions.values(), manifest.path_for(output)):
        require_absent(file)
    options = dict(given)
    if importance:
        made = output.with_suffix(".imatrix.gguf")  # of records
        is_matrix = Path(importance).suffix in _MATRIX_SUFFIXES
        options["importance"] = importance if is_matrix else str(made)
        if not is_matrix and not (completes and made.is_file()):
            if not isinstance(adapter, str | None):
                raise SaigaError("--importance with records takes at most one --adapter, without a weight.")
            calibration.importance_of_records(importance, _plan(adapter, given), made, quant_types=quant_types)
    if further := list(quant_types[1:]):
        options["quant_types"] = further
    output = exporting.to_gguf(adapter=adapter, quant_type=quant_types[0], with_manifest=True, **options)
    files, spec = gguf_export.output_files(output, quant_types), registry.find(given["model"])
    inputs = manifest.read(output)["inputs"]
    written = model_card.write_companions(files, spec=spec, inputs=inputs, prefix=prefix, completes=completes)
    lines = [f"model: {_with_size(file)}" for file in files.values()]
    also = ", ".join(file.name for file in [*written, manifest.path_for(output)])
    return [*lines, f"also:  {also}", f"talk:  saigakit chat {shlex.quote(str(output))}"]


def _plan(adapter: str | _Weighted | None, given: dict[str, Any]) -> MergePlan:
    options = {name: given[name] for name in _OF_PLAN if name in given}
    return MergePlan.of(given["model"], adapter, **options)


def _with_size(file: Path) -> str:
    return f"{file} ({file.stat().st_size / 1e6:,.0f} MB)"


def _parse_weighted(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0  # the colon belongs to the path
