"""Find the record files that a parameter names: local, in an attached input or in a data set on the Hub."""

import glob
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from saigakit.config import require_name
from saigakit.core import hub, workspace
from saigakit.core.lazy import datasets, huggingface_hub
from saigakit.data import formats
from saigakit.demo import tool_records, wordnet_records
from saigakit.errors import SaigaError

_PACKAGED = {"package:wordnet": wordnet_records, "package:tools": tool_records}
_EVALUATION = ("validation", "valid", "val", "dev", "eval", "test")  # splits to offer, the first one that there is


def records_files(
    names: str | Sequence[str], run_dir: str | Path | None = None, *, offers_evaluation: bool = False
) -> list[Path]:
    """Resolve files, directories, glob patterns, demo files or data sets on the Hub; local ones take precedence.

    They may be in `run_dir`, in the working directory or in an attached input. On the Hub: "owner/name", with an
    optional "@revision" and then ":split", ":configuration" or ":configuration/split"; a file's name without number
    and suffix is a split too. Directories may have a ":split". `offers_evaluation`: print which could be held_out.
    """
    names = [names] if isinstance(names, str) else names
    for name in names:
        require_name("records", name)
    if not names or not all(map(str.strip, names)):
        raise SaigaError("records is empty: name a file, a directory, a pattern or a data set on the Hub.")
    files = [file for name in names for file in _find_files(name, run_dir, offers_evaluation)]
    # Not resolved: in the Hub's cache, two files with the same content are links to one.
    if twice := [str(file) for file, count in Counter(file.absolute() for file in files).items() if count > 1]:
        raise SaigaError(f"{twice[0]} is named twice; name it once.")
    return files


def _find_files(name: str, run_dir: str | Path | None, offers_evaluation: bool) -> list[Path]:
    package, _, part = name.partition("/")
    if package in _PACKAGED:
        file = _PACKAGED[package].packaged_records() / part
        if not file.is_file():
            raise SaigaError(f"{name!r} is not there; the demo has train.jsonl and held_out.jsonl.")
        return [file]
    if not workspace.is_local(name, run_dir):
        at, _, choice = name.partition(":")
        directory = workspace.find_optional_input(at, run_dir=run_dir) if choice else None
        if directory is not None and directory.is_dir():
            return _choose_files(directory, at, choice, offers_evaluation)
        if hub.is_hub_id(at.partition("@")[0]) and not name.endswith(formats.FILES):
            return _fetch_data_set(at, choice, offers_evaluation)
        if set("*?[") & set(name):
            return _find_matching(name, run_dir)
    found = workspace.find_input(name, run_dir=run_dir)
    return _choose_files(found, name, "", offers_evaluation) if found.is_dir() else [found]


def formatted_records(part: str, run_dir: str | Path) -> Path | None:
    """Find a file of 01_format ("train", "held_out") in `run_dir` or in an attached input."""
    return workspace.find_optional_input(f"01_format/{part}.jsonl", run_dir=run_dir)


def _choose_files(directory: Path, name: str, split: str, offers_evaluation: bool) -> list[Path]:
    """Take `split`, or else train, or all files if there are no splits, and print what is left out."""
    found = sorted(file.relative_to(directory) for file in directory.rglob("*") if file.is_file())
    names = [file.as_posix() for file in found if not any(part.startswith(".") for part in file.parts)]
    names = [each for each in names if Path(each).name not in formats.METADATA]
    has_records = any(each.lower().endswith((*formats.SUFFIXES, *formats.TABLES)) for each in names)
    splits = _find_local_splits(directory.resolve()) if has_records else _find_saved_splits(directory.resolve())
    prefix = f"{directory.resolve().as_posix()}/"
    chosen = sorted(_choose_split(f"{name}:", splits, split, prefix, names, offers_evaluation))
    if others := [each for each in names if each not in chosen]:
        shown = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        print(f"{directory.name}: {len(chosen)} of {len(names)} files are read; left out: {shown}.", flush=True)
    return [directory / each for each in chosen]


def _find_saved_splits(directory: Path) -> dict[str, list[str]]:
    """The Arrow files of each split of a data set that `datasets` has saved with save_to_disk."""
    found: dict[str, list[str]] = {}
    for state in sorted([*directory.glob("state.json"), *directory.glob("*/state.json")]):
        try:
            files = [state.parent / each["filename"] for each in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise SaigaError(f"{state} is not the state of a saved data set; save the data set again.") from None
        if lost := [file.name for file in files if not file.is_file()]:
            raise SaigaError(f"{state.parent} lost {', '.join(lost)}; save the data set again.")
        found["train" if state.parent == directory else state.parent.name] = [file.as_posix() for file in files]
    return found


def _find_local_splits(directory: Path) -> Mapping[str, Sequence[str]]:
    """Like `datasets`: by the configurations in the card, or else by file names."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base, card = str(directory), directory / "README.md"
    if card.is_file() and "configs" in (huggingface_hub.metadata_load(card) or {}):
        return _find_splits(base, "")
    suffixes = [each for kind in (*formats.SUFFIXES, *formats.TABLES) for each in (kind, kind.upper())]
    try:
        return DataFilesDict.from_patterns(get_data_patterns(base), base, allowed_extensions=suffixes)  # type: ignore[no-any-return]
    except EmptyDatasetError:
        return {}


def _find_splits(source: str, configuration: str, **place: str | None) -> dict[str, Sequence[str]]:
    """The files of each split as `datasets` finds them; an empty `configuration` is the default one."""
    from datasets.data_files import EmptyDatasetError

    try:
        builder = datasets.load_dataset_builder(source, configuration or None, cache_dir=str(hub.cache_dir()), **place)
    except EmptyDatasetError:
        return {}
    except ValueError:
        known = ", ".join(datasets.get_dataset_config_names(source, **place))
        problem = f"no configuration {configuration!r}" if configuration else "more than one configuration"
        remedy = f"as in {source}:NAME" if place else "by naming its files or its directory"
        raise SaigaError(f"{source} has {problem}. Choose one of {known}, {remedy}.") from None
    return {str(split): files for split, files in (builder.config.data_files or {}).items()}


def _choose_split(
    asked: str,
    splits: Mapping[str, Sequence[str]],
    wanted: str,
    prefix: str,
    names: Sequence[str],
    offers_evaluation: bool,
) -> list[str]:
    """The record files of `wanted`, or else of train or the only split, without `prefix`.

    `asked`: the name of the data set, to which a split can be added; `names`: all files.
    """
    source = asked.rpartition(":")[0]
    kinds = formats.FILES
    if any(name.lower().endswith(formats.SUFFIXES) for name in names):
        kinds = tuple(kind for kind in kinds if kind not in formats.TABLES)
    readable = {prefix + name: name for name in names if name.lower().endswith(kinds)}
    chosen = {str(split): [readable[file] for file in found if file in readable] for split, found in splits.items()}
    usable = {split: found for split, found in chosen.items() if found}
    if not usable:
        raise SaigaError(
            f"{source} has no record files ({', '.join(formats.SUFFIXES)}) but {', '.join(names[:10]) or 'nothing'}. "
            "Convert the records to JSONL."
        )
    split = wanted or ("train" if "train" in usable or len(usable) > 1 else next(iter(usable)))
    every = [file for found in usable.values() for file in found]
    stems = {stem: [file for file in every if _stem(file) == stem] for stem in map(_stem, every)}
    known = usable if split in usable else stems
    if split not in known:
        raise SaigaError(f"{source} has no split {split!r}. Choose one of {', '.join({**usable, **stems})}.")
    merged = sorted({_stem(file) for file in known[split]})
    if len(merged) > 1 and prefix.startswith("hf:"):
        shown = ", ".join(merged[:10]) + (f" and {len(merged) - 10} more" if len(merged) > 10 else "")
        print(f'{source}: {split} is made of the files {shown}; name one as in "{asked}{merged[0]}".', flush=True)
    others = (split.replace("train", each) if "train" in split else each for each in _EVALUATION)
    if offers_evaluation and (other := next((each for each in others if each in known and each != split), None)):
        print(f'{source} also has the split {other}: held_out="{asked}{other}" uses it for evaluation.', flush=True)
    return known[split]


def _stem(file: str) -> str:
    """Its name without number and suffix, such as "ru" for data/ru-00000-of-00001.parquet."""
    ending = r"(-\d{5}-of-\d{5})?(\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|gz|zst))*$"
    return re.sub(ending, "", Path(file).name, flags=re.IGNORECASE)


def _find_matching(pattern: str, run_dir: str | Path | None) -> list[Path]:
    """Search `run_dir`, the working directory and the attached inputs, up to the first match."""
    name = str(Path(pattern).expanduser())
    for base in (Path(run_dir or ""), Path()):
        # Path.glob refuses absolute patterns and matches hidden files.
        found = [base / match for match in glob.glob(name, root_dir=base, recursive=True)]  # noqa: PTH207
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


def _fetch_data_set(at: str, choice: str, offers_evaluation: bool) -> list[Path]:
    """`at`: owner/name or owner/name@revision. `choice`: a split, a configuration or configuration/split."""
    repo, _, revision = at.partition("@")
    commit, sizes = hub.list_files(repo, "dataset", revision or None)
    place = {"revision": commit, "token": hub.token()}
    configuration, _, split = choice.rpartition("/")
    with hub.download_errors_explained(repo, "dataset"):
        if split and not configuration and split in datasets.get_dataset_config_names(repo, **place):
            configuration, split = split, ""
        asked = f"{at}:{configuration}/" if configuration else f"{at}:"
        splits = _find_splits(repo, configuration, **place)
        prefix = f"hf://datasets/{repo}@{commit}/"
        names = _choose_split(asked, splits, split, prefix, sorted(sizes), offers_evaluation)
    hub.require_room(repo, "dataset", sum(sizes[name] for name in names))
    directory = hub.snapshot(repo, tuple(map(glob.escape, names)), "dataset", commit)
    return [directory / name for name in names]
