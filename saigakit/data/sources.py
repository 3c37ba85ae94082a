"""What a parameter names (a model, an adapter, records) into local files, from an attachment or the Hub."""

import glob
from pathlib import Path

from saigakit.core import hub, workspace
from saigakit.data import records, splits
from saigakit.demo import wordnet_records
from saigakit.errors import SaigaError

_PACKAGED_RECORDS = "package:wordnet/"
_FILES = (*records.SUFFIXES, *records.REFUSED)  # so ends the name of a file, and of no data set


def records_files(name: str, run_dir: str | Path | None = None) -> list[Path]:
    """A file, a directory's files of records, those that fit a pattern, one of the demo's two or a data set of the Hub.

    Inside `run_dir`, from here or in an attached input. Of the Hub: "owner/name", also with ":split",
    ":configuration" or ":configuration/split"; what is here goes first.
    """
    if not name.strip():
        raise SaigaError("records is empty: name a file, a directory, a pattern or a data set of the Hub.")
    if name.startswith(_PACKAGED_RECORDS):
        return [_packaged_records(name.removeprefix(_PACKAGED_RECORDS))]
    repo, _, choice = name.partition(":")
    if hub.is_hub_id(repo) and not name.endswith(_FILES) and not workspace.is_local(name, run_dir):
        return _data_set(repo, choice)
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
    """As of a data set of the Hub: the split train, where names say splits. What else there is, is said."""
    inside = [file.relative_to(directory) for file in sorted(directory.rglob("*")) if file.is_file()]
    names = [path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts)]
    chosen = splits.records_of(str(directory), names)
    if others := [name for name in names if name not in chosen]:
        shown = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        print(f"{directory.name}: {len(chosen)} of {len(names)} files are read; left out: {shown}.", flush=True)
    return [directory / name for name in chosen]


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


def _data_set(repo: str, choice: str) -> list[Path]:
    """The files of one split, fetched."""
    sizes = hub.file_sizes(repo, "dataset")
    names = splits.records_of(repo, list(sizes), choice)
    hub.require_room(repo, "dataset", sum(sizes[name] for name in names))
    directory = hub.snapshot(repo, tuple(map(glob.escape, names)), "dataset")
    return [directory / name for name in names]
