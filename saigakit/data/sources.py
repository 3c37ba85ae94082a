"""Find the record files that a parameter names: local, in an attached input or in a data set on the Hub."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from saigakit.core import hub, workspace
from saigakit.data import records
from saigakit.demo import wordnet_records
from saigakit.errors import SaigaError

_PACKAGED_RECORDS = "package:wordnet/"
_FILES = (*records.SUFFIXES, *records.REFUSED)  # a name with such an ending is a file, not a data set


def records_files(name: str, run_dir: str | Path | None = None) -> list[Path]:
    """Resolve a file, directory, glob pattern, demo file or data set on the Hub; local ones take precedence.

    They may be in `run_dir`, in the working directory or in an attached input. On the Hub: "owner/name", with an
    optional "@revision" and then ":split", ":configuration" or ":configuration/split".
    """
    if not name.strip():
        raise SaigaError("records is empty: name a file, a directory, a pattern or a data set on the Hub.")
    if name.startswith(_PACKAGED_RECORDS):
        file = wordnet_records.packaged_records() / name.removeprefix(_PACKAGED_RECORDS)
        if not file.is_file():
            raise SaigaError(f"{name!r} is not there; the demo has train.jsonl and held_out.jsonl.")
        return [file]
    at, _, choice = name.partition(":")
    repo, _, revision = at.partition("@")
    if hub.is_hub_id(repo) and not name.endswith(_FILES) and not workspace.is_local(name, run_dir):
        return _fetch_data_set(repo, revision or None, choice)
    places = [Path(name).expanduser(), *([] if run_dir is None else [Path(run_dir) / name])]
    if set("*?[") & set(name) and not any(place.exists() for place in places):
        return _find_matching(name, run_dir)
    found = workspace.find_input(name, run_dir=run_dir)
    return _choose_files(found) if found.is_dir() else [found]


def formatted_records(part: str, run_dir: str | Path) -> Path | None:
    """Find a file of 01_format ("train", "held_out") in `run_dir` or in an attached input."""
    return workspace.find_optional_input(f"01_format/{part}.jsonl", run_dir=run_dir)


def _choose_files(directory: Path) -> list[Path]:
    """Take the split train, or all files if there are no splits, and print what is left out."""
    names = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
    prefix = f"{directory.resolve().as_posix()}/"
    chosen = sorted(_choose_split(str(directory), _find_local_splits(directory.resolve()), "", prefix, names))
    if others := [name for name in names if name not in chosen]:
        shown = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        print(f"{directory.name}: {len(chosen)} of {len(names)} files are read; left out: {shown}.", flush=True)
    return [directory / name for name in chosen]


def _find_local_splits(directory: Path) -> Mapping[str, Sequence[str]]:
    """Like `datasets`: by the configurations in the card, or else by file names."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
    from huggingface_hub import metadata_load

    base, card = str(directory), directory / "README.md"
    if card.is_file() and "configs" in (metadata_load(card) or {}):
        return _find_splits(base, "")
    suffixes = [each for suffix in records.SUFFIXES for each in (suffix, suffix.upper())]
    try:
        return DataFilesDict.from_patterns(get_data_patterns(base), base, allowed_extensions=suffixes)  # type: ignore[no-any-return]
    except EmptyDatasetError:
        return {}


def _find_splits(source: str, configuration: str, **place: str | None) -> dict[str, Sequence[str]]:
    """The files of each split as `datasets` finds them; an empty `configuration` is the default one."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from datasets.data_files import EmptyDatasetError

    try:
        builder = load_dataset_builder(source, configuration or None, cache_dir=str(hub.cache_dir()), **place)
    except EmptyDatasetError:
        return {}
    except ValueError:
        known = ", ".join(get_dataset_config_names(source, **place))
        problem = f"no configuration {configuration!r}" if configuration else "more than one configuration"
        remedy = f"as in {source}:NAME" if place else "by naming its files or its directory"
        raise SaigaError(f"{source} has {problem}. Choose one of {known}, {remedy}.") from None
    return {str(split): files for split, files in (builder.config.data_files or {}).items()}


def _choose_split(
    source: str, splits: Mapping[str, Sequence[str]], wanted: str, prefix: str, names: Sequence[str]
) -> list[str]:
    """The record files of `wanted`, or else of train or the only split, without `prefix`. `names`: all files."""
    record_files = {prefix + name for name in names if name.lower().endswith(_FILES)}
    chosen = {
        split: [file.removeprefix(prefix) for file in files if file in record_files] for split, files in splits.items()
    }
    usable = {split: files for split, files in chosen.items() if files}
    if not usable:
        raise SaigaError(
            f"{source} has no record files ({', '.join(records.SUFFIXES)}) but {', '.join(names[:10]) or 'nothing'}. "
            "Convert the records to JSONL."
        )
    split = wanted or ("train" if "train" in usable or len(usable) > 1 else next(iter(usable)))
    if split not in usable:
        raise SaigaError(f"{source} has no split {split!r}. Choose one of {', '.join(usable)}.")
    return usable[split]


def _find_matching(pattern: str, run_dir: str | Path | None) -> list[Path]:
    """Search `run_dir`, the working directory and the attached inputs, up to the first match."""
    name = str(Path(pattern).expanduser())
    for place in (run_dir, None):
        base = Path() if place is None else Path(place)
        # Path.glob refuses absolute patterns and matches hidden files.
        found = [base / match for match in glob.glob(name, root_dir=place, recursive=True)]  # noqa: PTH207
        if files := sorted({file for file in found if file.is_file()}):
            return files
    roots = workspace.input_roots() if not Path(name).is_absolute() else []
    files = sorted({file for root in roots for file in root.rglob(name) if file.is_file() and file.name[0] != "."})
    tops = {Path(*file.parts[: -len(Path(name).parts)]) for file in files}
    if len(tops) > 1 and "**" not in name:
        raise SaigaError(f"{pattern!r} matches in several places: {', '.join(map(str, sorted(tops)))}. Choose one.")
    if not files:
        has_files = run_dir is not None and any(Path(run_dir).glob("*"))
        searched = [*([run_dir] if has_files else []), Path.cwd(), *workspace.input_roots()]
        raise SaigaError(f"No file matches {pattern!r}. Searched {', '.join(map(str, searched))}.")
    return files


def _fetch_data_set(repo: str, revision: str | None, choice: str) -> list[Path]:
    commit, sizes = hub.list_files(repo, "dataset", revision)
    with hub.download_errors_explained(repo, "dataset"):
        names = _choose_remote(repo, commit, choice, sorted(sizes))
    hub.require_room(repo, "dataset", sum(sizes[name] for name in names))
    directory = hub.snapshot(repo, tuple(map(glob.escape, names)), "dataset", commit)
    return [directory / name for name in names]


def _choose_remote(repo: str, commit: str, choice: str, names: Sequence[str]) -> list[str]:
    """The files of a split; `choice` is a split, a configuration or configuration/split."""
    from datasets import get_dataset_config_names

    place = {"revision": commit, "token": workspace.secret("HF_TOKEN")}
    configuration, _, split = choice.rpartition("/")
    if split and not configuration and split in get_dataset_config_names(repo, **place):
        configuration, split = split, ""
    splits = _find_splits(repo, configuration, **place)
    return _choose_split(repo, splits, split, f"hf://datasets/{repo}@{commit}/", names)
