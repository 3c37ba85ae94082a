"""Find the files of records that a parameter names: here, in an attachment, or in a data set of the Hub."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from saigakit.core import hub, workspace
from saigakit.data import records
from saigakit.demo import wordnet_records
from saigakit.errors import SaigaError

_PACKAGED_RECORDS = "package:wordnet/"
_FILES = (*records.SUFFIXES, *records.REFUSED)  # so ends the name of a file, and of no data set


def records_files(name: str, run_dir: str | Path | None = None) -> list[Path]:
    """A file, a directory's files of records, those that fit a pattern, one of the demo's two or a data set of the Hub.

    Inside `run_dir`, from here or in an attached input. Of the Hub: "owner/name", also with "@revision" and then
    ":split", ":configuration" or ":configuration/split"; what is here goes first.
    """
    if not name.strip():
        raise SaigaError("records is empty: name a file, a directory, a pattern or a data set of the Hub.")
    if name.startswith(_PACKAGED_RECORDS):
        return [_packaged_records(name.removeprefix(_PACKAGED_RECORDS))]
    at, _, choice = name.partition(":")
    repo, _, revision = at.partition("@")
    if hub.is_hub_id(repo) and not name.endswith(_FILES) and not workspace.is_local(name, run_dir):
        return _data_set(repo, revision or None, choice)
    places = [Path(name).expanduser(), *([] if run_dir is None else [Path(run_dir) / name])]
    if set("*?[") & set(name) and not any(place.exists() for place in places):
        return _matching(name, run_dir)
    found = workspace.find_input(name, run_dir=run_dir)
    return _files_below(found) if found.is_dir() else [found]


def formatted_records(part: str, run_dir: str | Path) -> Path | None:
    """Of 01_format ("train", "held_out"), inside `run_dir` or in an attached input; None where it is in neither."""
    return workspace.find_optional_input(f"01_format/{part}.jsonl", run_dir=run_dir)


def _packaged_records(name: str) -> Path:
    file = wordnet_records.packaged_records() / name
    if not file.is_file():
        raise SaigaError(f"'{_PACKAGED_RECORDS}{name}' is not there; the demo has train.jsonl and held_out.jsonl.")
    return file


def _files_below(directory: Path) -> list[Path]:
    """The split train, or all files if their names say no splits. What is left out is printed."""
    names = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
    base = directory.resolve()
    found = {split: [_below(base, file) for file in files] for split, files in _local_splits(base).items()}
    chosen = sorted(set(_of_split(str(directory), found, "", names)) & set(names))
    if others := [name for name in names if name not in chosen]:
        shown = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        print(f"{directory.name}: {len(chosen)} of {len(names)} files are read; left out: {shown}.", flush=True)
    return [directory / name for name in chosen]


def _below(base: Path, file: str) -> str:
    return Path(file).relative_to(base).as_posix()


def _local_splits(directory: Path) -> Mapping[str, Sequence[str]]:
    """As `datasets` finds them: by the card's configurations, else by the names of files of records."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
    from huggingface_hub import metadata_load

    base, card = str(directory), directory / "README.md"
    if card.is_file() and "configs" in (metadata_load(card) or {}):
        return _splits(base, "")
    suffixes = [each for suffix in records.SUFFIXES for each in (suffix, suffix.upper())]
    try:
        return DataFilesDict.from_patterns(get_data_patterns(base), base, allowed_extensions=suffixes)  # type: ignore[no-any-return]
    except EmptyDatasetError:
        return {}


def _splits(source: str, configuration: str, **place: str | None) -> dict[str, Sequence[str]]:
    """The files of each split of a configuration, as `datasets` finds them; an empty name is the default one."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from datasets.data_files import EmptyDatasetError

    try:
        builder = load_dataset_builder(source, configuration or None, cache_dir=str(hub.cache_dir()), **place)
    except EmptyDatasetError:
        return {}
    except ValueError:
        known = ", ".join(get_dataset_config_names(source, **place))
        which = f"no configuration {configuration!r}" if configuration else "more than one configuration"
        raise SaigaError(f"{source} has {which}. Name one of {known}, as in {source}:NAME.") from None
    return {str(split): files for split, files in (builder.config.data_files or {}).items()}


def _of_split(source: str, splits: Mapping[str, Sequence[str]], wanted: str, names: Sequence[str]) -> Sequence[str]:
    """The files of records of a split; of train, or of the only one, if `wanted` is empty. `names`: all files."""
    usable = {split: [file for file in files if file.lower().endswith(_FILES)] for split, files in splits.items()}
    usable = {split: files for split, files in usable.items() if files}
    if not usable:
        raise SaigaError(
            f"{source} has no file of records ({', '.join(records.SUFFIXES)}), but {', '.join(names[:10]) or 'nothing'}"
            ". Convert what you want to train on to JSONL."
        )
    chosen = wanted or ("train" if "train" in usable or len(usable) > 1 else next(iter(usable)))
    if chosen not in usable:
        raise SaigaError(f"{source} has no split {chosen!r}. Its splits: {', '.join(usable)}.")
    return usable[chosen]


def _matching(pattern: str, run_dir: str | Path | None) -> list[Path]:
    """Of the first place where something fits: `run_dir`, here, the attached inputs."""
    name = str(Path(pattern).expanduser())
    for place in (run_dir, None):
        base = Path() if place is None else Path(place)
        # Path.glob takes no absolute pattern, and hidden files.
        found = [base / match for match in glob.glob(name, root_dir=place, recursive=True)]  # noqa: PTH207
        if files := sorted({file for file in found if file.is_file()}):
            return files
    roots = workspace.input_roots() if not Path(name).is_absolute() else []
    files = sorted({file for root in roots for file in root.rglob(name) if file.is_file() and file.name[0] != "."})
    tops = {Path(*file.parts[: -len(Path(name).parts)]) for file in files}
    if len(tops) > 1 and "**" not in name:
        raise SaigaError(f"{pattern!r} fits in more than one place: {', '.join(map(str, sorted(tops)))}. Name one.")
    if not files:
        holds_files = run_dir is not None and any(Path(run_dir).glob("*"))
        looked = [*([run_dir] if holds_files else []), Path.cwd(), *workspace.input_roots()]
        raise SaigaError(f"No file fits {pattern!r}. Looked in {', '.join(map(str, looked))}.")
    return files


def _data_set(repo: str, revision: str | None, choice: str) -> list[Path]:
    """The files of one split, fetched."""
    commit, sizes = hub.list_files(repo, "dataset", revision)
    with hub.download_errors_explained(repo, "dataset"):
        names = _chosen(repo, commit, choice, sorted(sizes))
    hub.require_room(repo, "dataset", sum(sizes[name] for name in names))
    directory = hub.snapshot(repo, tuple(map(glob.escape, names)), "dataset", commit)
    return [directory / name for name in names]


def _chosen(repo: str, commit: str, choice: str, names: Sequence[str]) -> list[str]:
    """Names of the files of a split; `choice` is a split, a configuration or configuration/split."""
    from datasets import get_dataset_config_names

    place = {"revision": commit, "token": workspace.secret("HF_TOKEN")}
    configuration, _, split = choice.rpartition("/")
    if split and not configuration and split in get_dataset_config_names(repo, **place):
        configuration, split = split, ""
    begin = f"hf://datasets/{repo}@{commit}/"
    found = _splits(repo, configuration, **place)
    below = {each: [file.removeprefix(begin) for file in files] for each, files in found.items()}
    return [name for name in _of_split(repo, below, split, names) if name in names]
