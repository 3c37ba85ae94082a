"""Name the base model, the adapters to merge into it, and how they are merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from saigakit import registry
from saigakit.core import workspace
from saigakit.errors import SaigaError
from saigakit.prompt import encoding, template
from saigakit.prompt.encoding import FastTokenizer
from saigakit.registry import ModelSpec
from saigakit.weights import find, lineage
from saigakit.weights.lineage import Lineage, MergeInto
from saigakit.weights.merge import Merged

AdapterNames = str | Path | Sequence[tuple[str | Path, float]] | None
_TOKENIZER = ("tokenizer.json", "tokenizer.model")
_REMEDY = "Give the directory of the tokenizer and template to use as --tokenizer."


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Adapter directories with their weights, and where the base comes from. Nothing is read until it is needed."""

    spec: ModelSpec
    adapters: Sequence[tuple[Path, float]] = ()
    base_source: str | None = None
    merge_into: MergeInto = "auto"
    tokenizer: str | Path | None = None  # directory of that of the training, if it is not found
    chat_template: str | None = None  # instead of the one found
    formatted_template: str | None = None  # that 01_format was given

    @classmethod
    def of(
        cls,
        model: str,
        adapter: AdapterNames,
        *,
        run_dir: str | Path | None = None,
        base_source: str | None = None,
        merge_into: MergeInto = "auto",
        tokenizer: str | Path | None = None,
        chat_template: str | None = None,
    ) -> Self:
        """Look up the names; `adapter` is one adapter as `find.adapter_dir` takes it, or several with weights."""
        spec = registry.find(model)
        named = [(str(name) if isinstance(name, Path) else name, weight) for name, weight in weighted(adapter)]
        adapters = [(find.adapter_dir(spec, name, run_dir), weight) for name, weight in named]
        formatted = None if run_dir is None else workspace.find_optional_input("01_format", run_dir=run_dir)
        return cls(
            spec=spec,
            adapters=adapters,
            base_source=base_source,
            merge_into=merge_into,
            tokenizer=tokenizer,
            chat_template=chat_template,
            formatted_template=template.formatted_template(formatted),
        )

    @property
    def adapter_dirs(self) -> list[Path]:
        return [directory for directory, _ in self.adapters]

    @cached_property
    def base_dir(self) -> Path:
        return find.base_dir(self.spec, self.base_source)

    @cached_property
    def lineage(self) -> Lineage:
        """Raises SaigaError for the adapter of another model, or one that does not allow `merge_into`."""
        return Lineage.read(self.spec, self.adapter_dirs, self.merge_into)

    @property
    def _dirs_of_training(self) -> list[Path]:
        return self.adapter_dirs if self.tokenizer is None else [Path(self.tokenizer)]

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the tokenizer of the training was given or lies next to an adapter."""
        return self.tokenizer is not None or bool(_first_with(_TOKENIZER, self.adapter_dirs))

    @cached_property
    def tokenizer_dir(self) -> Path:
        """The training's. Raises SaigaError if those of the adapters differ."""
        if self.tokenizer is not None:
            return Path(self.tokenizer)
        own = _first_with(_TOKENIZER, self.adapter_dirs)
        return find.tokenizer_dir(self.spec, self.base_source) if own is None else own

    def read_tokenizer(self) -> FastTokenizer:
        """With the template that was given, or lies next to an adapter, or was given to 01_format."""
        beside = _first_with([template.FILE], self._dirs_of_training)
        found = self.formatted_template if beside is None else str(beside / template.FILE)
        try:
            return encoding.read_tokenizer(self.spec, self.tokenizer_dir, self.chat_template or found)
        except SaigaError as error:
            raise (SaigaError(f"{error} {_REMEDY}") if self.has_own_tokenizer else error) from None

    def merge(self) -> Merged:
        """Read the headers. Raises SaigaError for damaged files and adapters that do not fit."""
        how = self.lineage  # checked before the base is fetched
        return Merged.open(
            self.base_dir, self.adapters, into=how.into, number_format=how.number_format, folded_rank=how.folded_rank
        )

    def require_same_base(self, base: Mapping[str, str] | None = None) -> None:
        """Raises SaigaError for an adapter trained on other weights; `base` is the base's hashes, if known."""
        for directory in self.adapter_dirs:
            lineage.require_same_base(directory, self.base_dir, base)


def weighted(adapter: AdapterNames) -> Sequence[tuple[str | Path, float]]:
    if adapter is None:
        return []
    return [(adapter, 1.0)] if isinstance(adapter, str | Path) else adapter


def _first_with(names: Sequence[str], directories: Sequence[Path]) -> Path | None:
    """The first directory that has one of these files. Raises SaigaError if they differ in another one."""
    found: Path | None = None
    contents: list[bytes] = []
    for directory in directories:
        if files := [directory / name for name in names if (directory / name).is_file()]:
            read = [file.read_bytes() for file in files]
            if found is not None and read != contents:
                raise SaigaError(f"{found} and {directory} have different tokenizers or templates. {_REMEDY}")
            found, contents = found or directory, read
    return found
