"""Options of a terminal into GGUF files with what other programs need beside them, or into another format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saigakit import export as exporting
from saigakit import registry
from saigakit.core import manifest
from saigakit.core.files import require_absent
from saigakit.errors import SaigaError
from saigakit.export import calibration, gguf_export, model_card, other_formats
from saigakit.llamacpp import quantization
from saigakit.weights import find

_MATRICES = (".gguf", ".dat", ".imatrix")


def export(*, file_format: str, adapters: Sequence[str], **options: Any) -> list[str]:  # noqa: ANN401
    """Makes it, and says what was made. `adapters`: PATH or PATH:WEIGHT each. The other options are those of `_gguf`.

    Raises SaigaError for options that the format does not take.
    """
    weighted = [_weighted(each) for each in adapters]
    if file_format == "gguf":
        return _gguf(weighted=weighted, **options)
    unused = [
        name for name in ("quant_types", "importance", *(["merge_into"] * (file_format == "lora"))) if options[name]
    ]
    if unused:
        raise SaigaError(f"--format {file_format} does not take --{unused[0].rstrip('s').replace('_', '-')}.")
    model, output, base_source = (options[name] for name in ("model", "output", "base_source"))
    if file_format == "safetensors":
        spec = registry.find(model)
        directories = [(find.adapter_dir(spec, path), weight) for path, weight in weighted]
        into = {"merge_into": options["merge_into"]} if options["merge_into"] else {}
        made = other_formats.to_safetensors(
            model=model, adapters=directories, output=output, base_source=base_source, **into
        )
        return [f"model: {made}, which transformers loads"]
    if len(weighted) != 1 or weighted[0][1] != 1:
        raise SaigaError("--format lora takes one --adapter, without a weight.")
    made = other_formats.to_lora_gguf(model=model, adapter=weighted[0][0], output=output, base_source=base_source)
    return [f"adapter: {_named(made)}; llama.cpp adds it to a GGUF of the base: --lora {made}"]


def _gguf(
    *,
    model: str,
    weighted: Sequence[tuple[str, float]],
    output: str,
    quant_types: Sequence[str],
    merge_into: str | None,
    importance: str | None,
    base_source: str | None,
) -> list[str]:
    if Path(output).suffix != ".gguf":
        raise SaigaError(f"--output {output}: the name of a GGUF file ends with .gguf.")
    quant_type, *further = chosen = quant_types or ("Q4_K_M",)
    for each in chosen:
        quantization.require_known(each)
    prefix = f"{Path(output).stem}."
    beside = model_card.paths(Path(output).parent, prefix)
    ours = manifest.path_for(Path(output))
    for file in [*gguf_export.paths(Path(output), chosen).values(), *beside.values(), ours]:
        require_absent(file)
    adapter = weighted[0][0] if len(weighted) == 1 and weighted[0][1] == 1 else weighted or None
    if importance and Path(importance).suffix not in _MATRICES:
        importance = str(_matrix(importance, model, adapter, output, base_source, merge_into, chosen))
    asked: dict[str, Any] = {"quant_types": further, "merge_into": merge_into, "importance": importance}
    given = {name: value for name, value in asked.items() if value}
    made = exporting.to_gguf(
        model=model,
        adapter=adapter,
        output=output,
        quant_type=quant_type,
        base_source=base_source,
        with_manifest=True,
        **given,
    )
    files, spec = gguf_export.paths(made, chosen), registry.find(model)
    inputs = manifest.read_for(made)["inputs"]
    written = [*model_card.write(files, spec=spec, inputs=inputs, prefix=prefix), ours]
    said = [f"model: {_named(file)}" for file in files.values()]
    return [*said, f"beside: {', '.join(file.name for file in written)}", f"talk:  saigakit chat {made}"]


def _matrix(
    records: str,
    model: str,
    adapter: str | Sequence[tuple[str, float]] | None,
    output: str,
    base_source: str | None,
    merge_into: str | None,
    quant_types: Sequence[str],
) -> Path:
    """Of the records, as OUTPUT.imatrix.gguf."""
    if not isinstance(adapter, str | None):
        raise SaigaError("An importance matrix is made of records for one adapter without a weight, or none.")
    file = Path(output).with_suffix(".imatrix.gguf")
    into: dict[str, Any] = {"merge_into": merge_into} if merge_into else {}
    return calibration.importance_of_records(
        records, model=model, adapter=adapter, output=file, base_source=base_source, quant_types=quant_types, **into
    )


def _named(file: Path) -> str:
    return f"{file} ({file.stat().st_size / 1e6:,.0f} MB)"


def _weighted(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0  # a colon of the path
