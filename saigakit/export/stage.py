"""Export a base model with its adapters as GGUF files: the stage 03_merge_gguf, and files on their own."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saigakit.core import manifest
from saigakit.core.files import require_absent, sha256, sha256_of_text
from saigakit.data import sources
from saigakit.export import estimate, fit, model_card
from saigakit.export.gguf_export import Export, output_files
from saigakit.export.merge_plan import AdapterNames, MergePlan, weighted
from saigakit.llamacpp import quantization
from saigakit.prompt import template
from saigakit.weights import base_files, find, lineage
from saigakit.weights.lineage import MergeInto

STAGE = "03_merge_gguf"
_RECORDS = 200  # of the evaluation set, whose ids are compared


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
    """Run the stage 03_merge_gguf: model.gguf, model-TYPE.gguf for further `quant_types`, pictures and a model card.

    Raises SaigaError within seconds if the files do not fit together, or the disk or memory is too small.
    """
    plan = MergePlan.of(model, adapter, run_dir=run_dir, base_source=base_source, merge_into=merge_into)
    export = Export.of(plan, [quant_type, *quant_types], importance)
    final = Path(run_dir) / STAGE
    if is_new := not final.exists():
        _announce(export, final, [final])  # before gigabytes are hashed
    identity = _identity(export, adapter)
    if manifest.is_up_to_date(final, **identity):
        return final
    if not is_new:
        _announce(export, final, [final])
    facts: dict[str, Any] = {}
    with manifest.making(final, facts=facts, **identity) as partial:
        facts |= export.write(partial / "model.gguf", _evaluation_texts(Path(run_dir)))
        sizes = {each: export.bytes(each) for each in quantization.QUANT_TYPES}
        adapter_bytes = sum(each.weights.bytes_on_disk for each, _ in export.merged.adapters) or None
        sizes_plot = estimate.plot_sizes(export.merged.base.bytes_on_disk, adapter_bytes, sizes, quant_type)
        sizes_plot.savefig(partial / "sizes.png", dpi=110)
        shown = {each: size for each, size in sizes.items() if each in (*fit.SHOWN, *export.quant_types)}
        files = fit.ModelFiles(shape=export.architecture.shape, longest=plan.spec.context_length, files=shown)
        facts["memory"] = {**files._asdict(), "shape": asdict(files.shape)}
        files.plot().savefig(partial / "memory.png", dpi=110)
        made = output_files(partial / "model.gguf", export.quant_types)
        model_card.write_companions(made, spec=plan.spec, inputs=identity["inputs"])
    return final


def _announce(export: Export, directory: Path, finals: Iterable[Path]) -> None:
    """Print an estimate. Raises SaigaError if the disk or the memory is too small."""
    export.require_room(directory, finals)
    print(estimate.estimate_table(export), export.describe_base(), sep="\n", flush=True)


def _identity(export: Export, adapter: object) -> dict[str, Any]:
    """The identity for a manifest. Raises SaigaError for an adapter that was trained on other weights."""
    plan, (quant_type, *further) = export.plan, export.quant_types
    parameters: dict[str, Any] = {"base_source": plan.base_source, "adapter": adapter, "merge_into": plan.merge_into}
    parameters |= {"model": plan.spec.name, "quant_type": quant_type}
    inputs: dict[str, Any] = {
        "base": base_files.hashes(plan.base_dir),
        "tokenizer": {file.name: sha256(file) for file in find.tokenizer_files(plan.tokenizer_dir)},
        "adapter": _numbered([manifest.hashes(directory) for directory in plan.adapter_dirs]),
        "train": _numbered([lineage.training_records(directory) for directory in plan.adapter_dirs]),
    }
    if further:
        parameters["quant_types"] = further
    if plan.chosen_template is not None:
        inputs["chat_template"] = sha256_of_text(template.find_chat_template(plan.chosen_template))
    if export.importance_file is not None:
        inputs["importance"] = sha256(export.importance_file)
    plan.require_same_base(inputs["base"])
    return {"stage": STAGE, "parameters": parameters, "inputs": inputs}


def _numbered(hashes: Sequence[dict[str, str]]) -> dict[str, str] | None:
    """Join the hashes of several directories; with more than one, each name begins with a number."""
    if len(hashes) < 2:
        return hashes[0] if hashes else None
    return {f"{at}/{name}": digest for at, files in enumerate(hashes, 1) for name, digest in files.items()}


def to_gguf(
    *,
    model: str,
    adapter: AdapterNames,
    output: str | Path,
    quant_type: str = "Q4_K_M",
    quant_types: Sequence[str] = (),
    base_source: str | None = None,
    merge_into: MergeInto = "auto",
    importance: str | Path | None = None,
    tokenizer: str | Path | None = None,
    chat_template: str | None = None,
    with_manifest: bool = False,
) -> Path:
    """Export GGUF files outside a stage; several adapters are added up by their weights.

    Further `quant_types` become OUTPUT-TYPE.gguf. `with_manifest` prints an estimate and writes OUTPUT.saigakit.json;
    files that such a call has made from the same inputs are kept.
    """
    file, chosen = Path(output), [quant_type, *quant_types]
    finals = [*output_files(file, chosen).values(), *([manifest.path_for(file)] if with_manifest else [])]
    is_made = with_manifest and file.is_file() and manifest.path_for(file).is_file()
    for path in [] if is_made else finals:
        require_absent(path)
    plan = MergePlan.of(
        model, adapter, base_source=base_source, merge_into=merge_into, tokenizer=tokenizer, chat_template=chat_template
    )
    export = Export.of(plan, chosen, importance)
    if not with_manifest:
        return write_gguf(export, file)
    if not is_made:
        _announce(export, file.parent, output_files(file, chosen).values())  # before gigabytes are hashed
    identity = _identity(export, [(str(name), weight) for name, weight in weighted(adapter)] or None)
    if manifest.describes(file, **identity):
        print(f"{file} is there and intact.", flush=True)
        return file
    for path in finals:
        require_absent(path)
    return write_gguf(export, file, identity)


def write_gguf(export: Export, file: Path, identity: Mapping[str, Any] | None = None) -> Path:
    """Write the files and compare ids on the evaluation set, if 01_format lies next to an adapter."""
    if identity is None:
        export.plan.require_same_base()
    runs = [directory.parent for directory in export.plan.adapter_dirs if (directory.parent / "01_format").is_dir()]
    export.write(file, _evaluation_texts(runs[0]) if runs else (), identity)
    return file


def _evaluation_texts(run_dir: Path) -> list[str]:
    """The messages of the first records of the evaluation set; prints that there are none."""
    if (file := sources.formatted_records("held_out", run_dir)) is None:
        print(
            f"There is no 01_format/held_out.jsonl in {run_dir} or attached: the ids that llama.cpp gives are not "
            "compared with those of the training.",
            flush=True,
        )
        return []
    with file.open(encoding="utf-8") as stream:
        records = [json.loads(line) for line in itertools.islice(stream, _RECORDS)]
    contents = [message.get("content") for record in records for message in record["messages"]]
    return [text for text in contents if isinstance(text, str) and text]
