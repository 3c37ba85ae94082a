"""Name the base model, the adapters to merge into it, and how they are merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

from saigakit import registry
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.encoding import FastTokenizer
from saigakit.registry import ModelSpec
from saigakit.weights import find, lineage
from saigakit.weights.lineage import Lineage, MergeInto
from saigakit.weights.merge import Merged

AdapterNames = str | Path | Sequence[tuple[str | Path, float]] | None


_COMPARED = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")
_REMEDY = "Give the directory of the tokenizer and template to use as --tokenizer."


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Adapter directories with their weights, and where the base comes from. Nothing is read until it is needed."""

    spec: ModelSpec
    adapters: Sequence[tuple[Path, float]] = ()
    base_source: str | None = None
    merge_into: MergeInto = "auto"
    tokenizer: str | Path | None = None  # directory of that of the training, if it is not found

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
    ) -> Self:
        """Look up the names; `adapter` is one adapter as `find.adapter_dir` takes it, or several with weights."""
        spec = registry.find(model)
        named = [(str(name) if isinstance(name, Path) else name, weight) for name, weight in weighted(adapter)]
        adapters = [(find.adapter_dir(spec, name, run_dir), weight) for name, weight in named]
        return cls(spec=spec, adapters=adapters, base_source=base_source, merge_into=merge_into, tokenizer=tokenizer)

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
    def own_tokenizer_dirs(self) -> list[Path]:
        """`tokenizer`, or the adapters' directories into which a trainer has saved its tokenizer."""
        if self.tokenizer is not None:
            return [Path(self.tokenizer)]
        return [each for each in self.adapter_dirs if any((each / name).is_file() for name in _COMPARED[:2])]

    @cached_property
    def tokenizer_dir(self) -> Path:
        """The training's. Raises SaigaError if those of the adapters differ."""
        own = self.own_tokenizer_dirs
        contents = [[(each / name).read_bytes() for name in _COMPARED if (each / name).is_file()] for each in own]
        if different := [each for each, files in zip(own, contents, strict=True) if files != contents[0]]:
            raise SaigaError(f"{own[0]} and {different[0]} have different tokenizers or templates. {_REMEDY}")
        return own[0] if own else find.tokenizer_dir(self.spec, self.base_source)

    def read_tokenizer(self) -> FastTokenizer:
        """With the chat template next to an adapter, even if the registry has one."""
        has_template = self.own_tokenizer_dirs and (self.tokenizer_dir / _COMPARED[-1]).is_file()
        spec = replace(self.spec, template=None) if has_template else self.spec
        try:
            return encoding.read_tokenizer(spec, self.tokenizer_dir)
        except SaigaError as error:
            raise (SaigaError(f"{error} {_REMEDY}") if self.own_tokenizer_dirs else error) from None

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
