"""Name the base model, the adapters to merge into it, and how they are merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from saigakit import registry
from saigakit.registry import ModelSpec
from saigakit.weights import find, lineage
from saigakit.weights.lineage import Lineage, MergeInto
from saigakit.weights.merge import Merged

AdapterNames = str | Path | Sequence[tuple[str | Path, float]] | None


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Adapter directories with their weights, and where the base comes from. Nothing is read until it is needed."""

    spec: ModelSpec
    adapters: Sequence[tuple[Path, float]] = ()
    base_source: str | None = None
    merge_into: MergeInto = "auto"

    @classmethod
    def of(
        cls,
        model: str,
        adapter: AdapterNames,
        *,
        run_dir: str | Path | None = None,
        base_source: str | None = None,
        merge_into: MergeInto = "auto",
    ) -> Self:
        """Look up the names; `adapter` is one adapter as `find.adapter_dir` takes it, or several with weights."""
        spec = registry.find(model)
        named = [(str(name) if isinstance(name, Path) else name, weight) for name, weight in weighted(adapter)]
        adapters = [(find.adapter_dir(spec, name, run_dir), weight) for name, weight in named]
        return cls(spec=spec, adapters=adapters, base_source=base_source, merge_into=merge_into)

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
