"""A base model and an adapter into quantised GGUF files, chunk by chunk: no merged copy on the way."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saigakit import registry
from saigakit.core import manifest
from saigakit.core.files import discard_partial, require_absent, sha256
from saigakit.data import sources
from saigakit.export import fit, model_card
from saigakit.export.gguf_export import Export, paths
from saigakit.llamacpp import quantization
from saigakit.weights import base_files, find, lineage
from saigakit.weights.lineage import MergeInto

STAGE = "03_merge_gguf"
_RECORDS = 200  # held-out records whose ids are compared


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
    spec = registry.find(model)
    adapter_dir = None if adapter is None else find.adapter_dir(spec, adapter, run_dir)
    export = Export.of(spec, adapter_dir, base_source, quant_type, merge_into, importance, quant_types)
    final = Path(run_dir) / STAGE
    if is_new := not final.exists():
        _announce(export, final)  # before gigabytes are hashed
    adapter_dirs = [] if adapter_dir is None else [adapter_dir]
    identity = _identity(export, adapter_dirs, base_source=base_source, adapter=adapter, merge_into=merge_into)
    if manifest.is_up_to_date(final, **identity):
        return final
    if not is_new:
        _announce(export, final)
    facts: dict[str, Any] = {}
    with manifest.making(final, facts=facts, **identity) as partial:
        facts |= export.write(partial / "model.gguf", _held_out_texts(Path(run_dir)))
        export.plot().savefig(partial / "sizes.png", dpi=110)
        shown = {*fit.SHOWN, *export.quant_types}
        by_type = {each: export.bytes(each) for each in quantization.QUANT_TYPES if each in shown}
        facts["memory"] = {"shape": asdict(export.architecture.shape), "longest": spec.context_length, "files": by_type}
        n_ctx = min(fit.LEAST_CONTEXT, spec.context_length)
        fit.plot(export.architecture.shape, by_type, n_ctx=n_ctx).savefig(partial / "memory.png", dpi=110)
        made = paths(partial / "model.gguf", export.quant_types)
        model_card.write(made, spec=spec, inputs=identity["inputs"])
    return final


def _identity(export: Export, adapter_dirs: Sequence[Path], **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a manifest begins with. Raises SaigaError for an adapter that was trained on other weights."""
    quant_type, *further = export.quant_types
    parameters |= {"model": export.spec.name, "quant_type": quant_type}
    tokenizer = find.tokenizer_files(export.spec, parameters["base_source"])
    inputs: dict[str, Any] = {
        "base": base_files.hashes(export.base_dir),
        "tokenizer": {file.name: sha256(file) for file in tokenizer},
        "adapter": _numbered([manifest.hashes(directory) for directory in adapter_dirs]),
        "train": _numbered([lineage.training_records(directory) for directory in adapter_dirs]),
    }
    if further:
        parameters["quant_types"] = further
    if export.importance_file is not None:
        inputs["importance"] = sha256(export.importance_file)
    for directory in adapter_dirs:
        lineage.require_same_base(directory, export.base_dir, inputs["base"])
    return {"stage": STAGE, "parameters": parameters, "inputs": inputs}


def _numbered(found: Sequence[dict[str, str]]) -> dict[str, str] | None:
    """Hashes of several directories in one; of more than one the names begin with a number."""
    if len(found) < 2:
        return found[0] if found else None
    return {f"{at}/{name}": digest for at, files in enumerate(found, 1) for name, digest in files.items()}


def _announce(export: Export, final: Path) -> None:
    discard_partial(final)  # of a run that was killed: its room is needed
    _say_plan(export, final)


def _say_plan(export: Export, directory: Path) -> None:
    export.require_room(directory)
    print(export.plan(), export.said_of_base, sep="\n", flush=True)


def require_possible(
    model: str,
    adapter: str | Path | None,
    base_source: str | None,
    quant_types: Sequence[str],
    merge_into: MergeInto,
    directory: Path,
) -> None:
    """Raises SaigaError where a file of `quant_types` cannot be made in `directory`, as far as headers tell."""
    spec, (quant_type, *further) = registry.find(model), quant_types
    adapter_dir = None if adapter is None else find.adapter_dir(spec, str(adapter))
    made = Export.of(spec, adapter_dir, base_source, quant_type, merge_into, quant_types=further)
    made.require_room(directory)


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
    with_manifest: bool = False,
) -> Path:
    """The GGUF alone, without a stage; several adapters come with their weights and are added up.

    Of every further type of `quant_types` there is a file beside `output`, with the type in its name. The ids of the
    held-out records are compared where 01_format is beside the adapter.
    `importance` is the file of an importance matrix, as llama.cpp writes them. `with_manifest`: the plan is printed,
    and OUTPUT.saigakit.json has the hashes of what the files were made of and of themselves, as that of a stage.

    Raises SaigaError where `output` is there already.
    """
    file, spec = Path(output), registry.find(model)
    for path in paths(file, [quant_type, *quant_types]).values():
        require_absent(path)
    given = [(adapter, 1.0)] if isinstance(adapter, str | Path) else adapter or ()
    adapters = [(find.adapter_dir(spec, str(one)), weight) for one, weight in given]
    export = Export.of(spec, adapters, base_source, quant_type, merge_into, importance, quant_types)
    adapter_dirs = [adapter_dir for adapter_dir, _ in adapters]
    identity = None
    if with_manifest:
        require_absent(manifest.path_for(file))
        export.discard_partials(file)
        _say_plan(export, file.parent)  # before gigabytes are hashed
        named = [(str(one), weight) for one, weight in given] or None
        identity = _identity(export, adapter_dirs, base_source=base_source, adapter=named, merge_into=merge_into)
    else:
        for adapter_dir in adapter_dirs:
            lineage.require_same_base(adapter_dir, export.base_dir)
    runs = [adapter_dir.parent for adapter_dir in adapter_dirs if (adapter_dir.parent / "01_format").is_dir()]
    export.write(file, _held_out_texts(runs[0]) if runs else (), identity)
    return file


def _held_out_texts(run_dir: Path) -> list[str]:
    """What is said in the first held-out records; nothing, which is printed, where there are none."""
    if (file := sources.formatted_records("held_out", run_dir)) is None:
        print(
            f"There are no held-out records of 01_format in {run_dir} or attached: llama.cpp's ids of them are not "
            "compared with those of the training.",
            flush=True,
        )
        return []
    with file.open(encoding="utf-8") as stream:
        records = [json.loads(line) for line in itertools.islice(stream, _RECORDS)]
    said = [message.get("content") for record in records for message in record["messages"]]
    return [text for text in said if isinstance(text, str) and text]
