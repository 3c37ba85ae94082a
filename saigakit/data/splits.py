"""Names of a data set's files into those of one split of one configuration."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from saigakit.data.records import SUFFIXES
from saigakit.errors import SaigaError

_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_DESCRIPTIONS = frozenset({"dataset_infos.json", "dataset_info.json"})  # which `datasets` writes beside the records


def records_of(repo: str, names: Sequence[str], choice: str = "") -> list[str]:
    """Of a repository's files; `choice`: a split, a configuration or configuration/split, else the split train.

    A split is said by a directory ("test/a.parquet") or by how a name begins ("train-00000.parquet"); where none is
    said, all files are taken. A configuration is a directory at the top; "." are the files outside of these.
    """
    usable = [name for name in sorted(names) if _holds_records(PurePosixPath(name))]
    if not usable:
        held = ", ".join(sorted(names)[:10]) or "nothing"
        raise SaigaError(
            f"{repo} holds no file of records ({', '.join(SUFFIXES)}), but {held}. "
            "Turn what you want to train on into JSONL."
        )
    before, _, after = choice.rpartition("/")
    configuration, asked = (before, after) if before or after in _SPLITS else (after, "")
    if configuration:
        usable = _of_configuration(repo, usable, configuration)
    usable = _of_split(repo, usable, asked)
    configurations = sorted(set(map(_configuration, usable)))
    if len(configurations) > 1 and _split(usable[0]) is not None:
        raise SaigaError(
            f"{repo} has more than one configuration: {', '.join(configurations)}. "
            f"Name one, as in {repo}:{configurations[-1]}."
        )
    return usable


def _holds_records(path: PurePosixPath) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.name.lower().endswith(SUFFIXES) and path.name not in _DESCRIPTIONS and not is_hidden


def _of_configuration(repo: str, names: Sequence[str], wanted: str) -> list[str]:
    found = [name for name in names if _configuration(name) == wanted]
    if not found:
        known = ", ".join(sorted(set(map(_configuration, names))))
        splits = ", ".join(sorted({split for name in names if (split := _split(name))})) or "none"
        raise SaigaError(
            f"{repo} has no configuration or split {wanted!r}. Its configurations: {known}; its splits: {splits}."
        )
    return found


def _of_split(repo: str, names: list[str], asked: str) -> list[str]:
    """`asked`: a word of _SPLITS; empty: train, or all files where their names say no split."""
    said = sorted({split for name in names if (split := _split(name))})
    if not said and not asked:
        return names
    wanted = _SPLITS.get(asked or "train")
    found = [name for name in names if wanted and _split(name) == wanted]
    if not found:
        known = f"its splits: {', '.join(said)}" if said else "the names of its files say no split; leave it out"
        raise SaigaError(f"{repo} has no split {asked or 'train'!r}; {known}.")
    return found


def _configuration(name: str) -> str:
    top, _, below = name.partition("/")
    return top if below and top.lower() not in _SPLITS else "."


def _split(name: str) -> str | None:
    path = PurePosixPath(name.lower())
    beginning = re.match(r"[a-z]*", path.name)
    words = [*path.parts[:-1], beginning[0] if beginning else ""]
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)
