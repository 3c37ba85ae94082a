"""Name the base model, the adapters to merge into it, and how they are merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from saigakit import registry
from saigakit.core import workspace
from saigakit.data import report
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
        formatted = None if run_dir is None else workspace.find_optional_input(report.STAGE, run_dir=run_dir)
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

    @cached_property
    def _own_tokenizer(self) -> tuple[Path | None, str | None]:
        """The directory of the training's tokenizer and its template, if they lie next to an adapter or were given."""
        found = self.adapter_dirs if self.tokenizer is None else [Path(self.tokenizer)]
        tokenizers = {contents: each for each in reversed(found) if (contents := _read_tokenizer_files(each))}
        templates = {text: each for each in reversed(found) if (text := template.read_own(each)) is not None}
        for each in (tokenizers, templates):
            if len(each) > 1:
                first, second = list(each.values())[::-1][:2]
                raise SaigaError(f"{first} and {second} have different tokenizers or templates. {_REMEDY}")
        return next(iter(tokenizers.values()), None), next(iter(templates), None)

    @property
    def has_own_tokenizer(self) -> bool:
        return self._own_tokenizer[0] is not None

    @cached_property
    def tokenizer_dir(self) -> Path:
        """The training's. Raises SaigaError if those of the adapters differ."""
        if self.tokenizer is not None:
            return Path(self.tokenizer)
        return self._own_tokenizer[0] or find.tokenizer_dir(self.spec, self.base_source)

    @property
    def chosen_template(self) -> str | None:
        """That was given, or lies next to an adapter, or was given to 01_format; None for the model's own."""
        found = (self.chat_template, self._own_tokenizer[1], self.formatted_template)
        return next((each for each in found if each is not None), None)

    def read_tokenizer(self) -> FastTokenizer:
        """With the chosen template. Raises SaigaError that says how to give another tokenizer."""
        try:
            return encoding.read_tokenizer(self.spec, self.tokenizer_dir, self.chosen_template)
        except SaigaError as error:
            is_found = self.has_own_tokenizer and self.chat_template is None
            raise (SaigaError(f"{str(error).removesuffix('.')}. {_REMEDY}") if is_found else error) from None

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


def _read_tokenizer_files(directory: Path) -> tuple[bytes, ...]:
    return tuple([file.read_bytes() for name in _TOKENIZER if (file := directory / name).is_file()])
