"""A base model and an adapter into quantised GGUF files, chunk by chunk: no merged copy on the way."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saigakit import companions, fit, lineage, manifest, models, quantization, read_back, sources
from saigakit.gguf_files import Export, paths
from saigakit.lineage import MergeInto

STAGE = "03_merge_gguf"


def merge_gguf(
    *,
    model: str,
    run_dir: str | Path,
    adapter: str | None = "02_train",
    base_source: str | None = None,
    quant_type: str = "Q4_K_M",
    quant_types: Sequence[str] = (),
    merge_into: MergeInto = "auto",
    importance: str | Path | None = None,
) -> Path:
    """The stage 03_merge_gguf: model.gguf and sizes.png in `run_dir`/03_merge_gguf.

    Of every further type of `quant_types` there is a model-TYPE.gguf, made of the same read of the base. Raises
    SaigaError in the first seconds where the files do not fit each other, the disk or the memory.
    """
    spec = models.find(model)
    adapter_dir = None if adapter is None else sources.adapter_dir(spec, adapter, run_dir)
    export = Export.of(spec, adapter_dir, base_source, quant_type, merge_into, importance, quant_types)
    final = Path(run_dir) / STAGE
    if is_new := not final.exists():
        _announce(export, final)  # before gigabytes are hashed
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {
            "model": model,
            "base_source": base_source,
            "adapter": adapter,
            "quant_type": quant_type,
            "merge_into": merge_into,
        },
        "inputs": {
            "base": manifest.hashes(export.base_dir),
            "adapter": None if adapter_dir is None else manifest.hashes(adapter_dir),
        },
    }
    if quant_types:
        identity["parameters"]["quant_types"] = list(quant_types)
    if importance is not None:
        identity["inputs"]["importance"] = manifest.sha256(Path(importance))
    if adapter_dir is not None:
        lineage.require_same_base(adapter_dir, export.base_dir, identity["inputs"]["base"])
    if manifest.is_kept(final, **identity):
        return final
    if not is_new:
        _announce(export, final)
    facts: dict[str, Any] = {}
    with manifest.making(final, facts=facts, **identity) as partial:
        facts |= export.write(partial / "model.gguf", read_back.held_out_texts(Path(run_dir)))
        export.plot().savefig(partial / "sizes.png", dpi=110)
        shown = {*fit.SHOWN, *export.quant_types}
        by_type = {each: export.bytes(each) for each in quantization.QUANT_TYPES if each in shown}
        facts["memory"] = {"shape": asdict(export.architecture.shape), "longest": spec.context_length, "files": by_type}
        n_ctx = min(fit.LEAST_CONTEXT, spec.context_length)
        fit.plot(export.architecture.shape, by_type, n_ctx=n_ctx).savefig(partial / "memory.png", dpi=110)
        made = paths(partial / "model.gguf", export.quant_types)
        companions.write(made, spec=spec, adapters=[] if adapter_dir is None else [adapter_dir])
    return final


def _announce(export: Export, final: Path) -> None:
    manifest.discard_partial(final)  # of a run that was killed: its room is needed
    export.require_room(final)
    print(export.plan(), export.said_of_base, sep="\n", flush=True)


def to_gguf(
    *,
    model: str,
    adapter: str | Path | Sequence[tuple[str | Path, float]] | None,
    output: str | Path,
    quant_type: str = "Q4_K_M",
    quant_types: Sequence[str] = (),
    base_source: str | None = None,
    merge_into: MergeInto = "auto",
    importance: str | Path | None = None,
) -> Path:
    """The GGUF alone, without a stage; several adapters come with their weights and are added up.

    Of every further type of `quant_types` there is a file beside `output`, with the type in its name. The ids of the
    held-out records are compared where 01_format is beside the adapter.
    `importance` is the file of an importance matrix, as llama.cpp writes them.

    Raises SaigaError where `output` is there already.
    """
    file, spec = Path(output), models.find(model)
    for path in paths(file, [quant_type, *quant_types]).values():
        manifest.require_absent(path)
    given = [(adapter, 1.0)] if isinstance(adapter, str | Path) else adapter or ()
    adapters = [(sources.adapter_dir(spec, str(one)), weight) for one, weight in given]
    export = Export.of(spec, adapters, base_source, quant_type, merge_into, importance, quant_types)
    for adapter_dir, _ in adapters:
        lineage.require_same_base(adapter_dir, export.base_dir)
    runs = [adapter_dir.parent for adapter_dir, _ in adapters if (adapter_dir.parent / "01_format").is_dir()]
    export.write(file, read_back.held_out_texts(runs[0]) if runs else ())
    return file
