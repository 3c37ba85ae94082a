"""Options of a terminal into GGUF files and what other programs need beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saigakit import companions, models, sources
from saigakit import export as exporting


def export(
    model: str,
    adapters: Sequence[str],
    output: str,
    quant_types: Sequence[str],
    *,
    merge_into: str | None,
    importance: str | None,
    base_source: str | None,
) -> tuple[list[Path], list[Path]]:
    """The GGUF files, `output` first, and those beside them. `adapters`: PATH or PATH:WEIGHT each."""
    weighted, (quant_type, *further) = [_weighted(each) for each in adapters], quant_types or ("Q4_K_M",)
    asked: dict[str, Any] = {"quant_types": further, "merge_into": merge_into, "importance": importance}
    asked["adapter"] = weighted[0][0] if len(weighted) == 1 and weighted[0][1] == 1 else weighted
    given = {name: value for name, value in asked.items() if value}
    made = exporting.to_gguf(
        **{"adapter": None, **given}, model=model, output=output, quant_type=quant_type, base_source=base_source
    )
    files = {quant_type: made} | {each: made.with_name(f"{made.stem}-{each}{made.suffix}") for each in further}
    spec = models.find(model)
    directories = [sources.adapter_dir(spec, path) for path, _ in weighted]
    beside = companions.write(files, spec=spec, adapters=directories, prefix=f"{made.stem}.")
    return list(files.values()), beside


def _weighted(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0  # a colon of the path
