"""Merge a base model and LoRA adapters in float32, one tensor or some of its rows at a time."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self, get_args

from saigakit.core.lazy import np, torch
from saigakit.errors import SaigaError
from saigakit.weights import nf4, tensors
from saigakit.weights.adapter import Adapter
from saigakit.weights.model_shape import ModelShape
from saigakit.weights.names import Names
from saigakit.weights.tensors import Array, Shape, Shards

Into = Literal["original", "dequantized"]
Adapters = Path | Sequence[tuple[Path, float]] | None
_ROWS = 4096  # of embeddings processed at a time
_CACHED_SCALES = 4  # matrices: the last rows of one are read while the next ones begin


@dataclass(frozen=True)
class Merged:
    """A base and the adapters that fit it; a tensor is W + the sum of weight * scale * B @ A, computed when it is read.

    `into` is what W is: the published weights, or those that nf4 training computed with in `number_format`.
    """

    base: Shards
    adapters: Sequence[tuple[Adapter, float]] = ()
    into: Into = "original"
    number_format: str = "float16"
    names: Names = field(default_factory=Names)
    is_tied: bool = False  # the base uses its embeddings as its head
    folded: Adapter | None = None  # was part of the base when training quantised it
    _scales: "dict[str, torch.Tensor]" = field(default_factory=dict, compare=False)  # of nf4 blocks
    _lengths: dict[str, Array] = field(default_factory=dict, compare=False)  # of embedding columns, for DoRA
    _lock: threading.RLock = field(default_factory=threading.RLock, compare=False)  # many threads read rows

    @classmethod
    def open(
        cls,
        base_dir: Path,
        adapters: Adapters,
        *,
        into: Into = "original",
        number_format: str = "float16",
        folded_rank: int = 0,
    ) -> Self:
        """Reads only headers. `folded_rank`: this many first ranks of the only adapter were folded into the base.

        Raises SaigaError for damaged files, the adapter of another base and adapters that cannot be added up.
        """
        if into not in get_args(Into):
            raise SaigaError(f"merge_into={into!r} is unknown; use one of {', '.join(get_args(Into))}.")
        if into == "dequantized":
            nf4.import_bitsandbytes()  # fails early if it is not installed
        base = tensors.open_base(base_dir)
        names = Names.of(base.stored)
        given = [(adapters, 1.0)] if isinstance(adapters, Path) else list(adapters or ())
        opened = [(Adapter.open(directory, names), weight) for directory, weight in given]
        _require_addable(opened)
        changed = {name for adapter, _ in opened for name in [*adapter.changed(), *adapter.tokens]}
        changes_embeddings = not changed.isdisjoint((names.embeddings, names.head))
        is_tied = changes_embeddings and ModelShape.from_config(base_dir).tied
        merged = cls(base, opened, into, number_format, names, is_tied)
        if folded_rank and into == "dequantized":
            ((adapter, weight),) = opened
            folded, rest = adapter.split(folded_rank)
            merged = replace(merged, adapters=[(rest, weight)], folded=folded)
        for adapter, _ in opened:
            _require_fit(base_dir, merged, adapter)
        return merged

    @cached_property
    def is_untied(self) -> bool:
        """Whether a tied matrix becomes two: the adapter changes embeddings or head, but not both as one."""
        if not self.is_tied:
            return False
        both = {embeddings := self.names.embeddings, head := self.names.head}
        return any(
            both & adapter.updates.keys()
            or (both & adapter.trained.keys() and not adapter.keeps_tied)
            or (head in adapter.tokens and adapter.tokens[head][1] != adapter.tokens.get(embeddings, ("", []))[1])
            for adapter, _ in self.adapters
        )

    @cached_property
    def vocabulary(self) -> int | None:
        """Rows of embeddings and head, if the adapter has its own for a resized vocabulary."""
        own = filter(None, map(self.replacement, (self.names.embeddings, self.names.head)))
        rows = [weights.stored[name].shape[0] for weights, name in own]
        base = self.base.stored.get(self.names.embeddings)
        return next((count for count in rows if base is not None and count != base.shape[0]), None)

    @property
    def shapes(self) -> dict[str, Shape]:
        shapes = {name: stored.shape for name, stored in self.base.stored.items()}
        if self.is_untied:
            shapes[self.names.head] = shapes[self.names.embeddings]
        if self.vocabulary is not None:
            both = {self.names.embeddings, self.names.head} & shapes.keys()
            shapes |= {name: (self.vocabulary, *shapes[name][1:]) for name in both}
        return shapes

    def read(self, name: str, rows: slice | None = None) -> Array:
        """The merged tensor or some of its rows. Raises SaigaError if a number is not finite."""
        tensor = self._before_update(name, rows)
        for adapter, weight in self.adapters:
            if name in adapter.updates:
                adapter.add(tensor, name, rows, weight)
                self._apply_magnitude(adapter, name, tensor, rows)
            if name in adapter.biases:
                stored, scale = adapter.biases[name]
                tensor = tensor + weight * scale * adapter.weights.read(stored, rows)
            if name in adapter.tokens:
                stored, ids = adapter.tokens[name]
                first = (rows.start or 0) if rows else 0
                wanted = [at for at, token in enumerate(ids) if first <= token < first + len(tensor)]
                tensor[[ids[at] - first for at in wanted]] = adapter.weights.read(stored)[wanted]
        numbers = torch.from_numpy(tensor)
        if not numbers.sum().isfinite() and not numbers.isfinite().all():  # a sum is fast, but may overflow
            base_file = self.base.stored[name if name in self.base.stored else self.names.embeddings].file
            where = "".join(f" and {adapter.directory}" for adapter, _ in self.adapters if name in adapter.changed())
            raise SaigaError(
                f"{name} contains NaN or infinity after merging {base_file}{where}: the training diverged or a file "
                "is damaged. Nothing was written; check the loss curve of 02_train or download the files again."
            )
        return tensor

    def _before_update(self, name: str, rows: slice | None) -> Array:
        """What the update is added to, as a copy."""
        if (source := self.replacement(name)) is not None:
            return source[0].read(source[1], rows)
        if self.is_untied and name == self.names.head:
            name = self.names.embeddings
        if self.into == "original" or not nf4.is_quantised(name, len(self.base.stored[name].shape)):
            return self.base.read(name, rows)
        return self._dequantised(name, rows or slice(None))

    def _dequantised(self, name: str, rows: slice) -> Array:
        shape = self.base.stored[name].shape
        first, stop, _ = rows.indices(shape[0])
        start, end = first // nf4.BLOCK * nf4.BLOCK, min(-(-stop // nf4.BLOCK) * nf4.BLOCK, shape[0])
        with self._lock:
            if name not in self._scales:
                while len(self._scales) >= _CACHED_SCALES:
                    del self._scales[next(iter(self._scales))]
                self._scales[name] = nf4.block_scales(partial(self._before_nf4, name), shape, self.number_format)
            scales = self._scales[name]
        scales = scales[start * shape[1] // nf4.BLOCK : -(-end * shape[1] // nf4.BLOCK)]
        blocks = nf4.round_trip(self._before_nf4(name, slice(start, end)), scales, self.number_format)
        return blocks[first - start : stop - start]

    def _before_nf4(self, name: str, rows: slice) -> Array:
        matrix = self.base.read(name, rows)
        if self.folded is not None and name in self.folded.updates:
            self.folded.add(matrix, name, rows)
        return matrix

    def replacement(self, name: str) -> tuple[Shards, str] | None:
        """The stored tensor that replaces the base's, if there is one. A copy of a tied matrix replaces both."""
        both = embeddings, head = self.names.embeddings, self.names.head
        same = (name, *both) if self.is_tied and name in both else (name,)
        for adapter, _ in self.adapters:
            if name in adapter.trained:
                return adapter.weights, adapter.trained[name]
            if name == embeddings and self.is_tied and adapter.keeps_tied and head in adapter.trained:
                return adapter.weights, adapter.trained[head]
            if copies := [adapter.copies[each] for each in same if each in adapter.copies]:
                return adapter.weights, copies[0]
        return None

    def _apply_magnitude(self, adapter: Adapter, name: str, updated: Array, rows: slice | None) -> None:
        """DoRA scales each row, or column of embeddings, to its trained length."""
        update = adapter.updates[name]
        if update.magnitude is None:
            return
        if update.of_embeddings:
            updated *= adapter.weights.read(update.magnitude) / self._column_lengths(adapter, name)
        else:
            lengths = np.linalg.norm(updated, axis=1)
            updated *= (adapter.weights.read(update.magnitude, rows) / lengths)[:, None]

    def _column_lengths(self, adapter: Adapter, name: str) -> Array:
        with self._lock:
            if name not in self._lengths:
                count, columns = adapter.shape(name)
                squares = np.zeros(columns, np.float64)
                for first in range(0, count, _ROWS):
                    rows = slice(first, first + _ROWS)
                    merged = self._before_update(name, rows)
                    adapter.add(merged, name, rows)
                    squares += np.square(merged, dtype=np.float64).sum(0)
                self._lengths[name] = np.sqrt(squares).astype(np.float32)
            return self._lengths[name]


def _require_addable(adapters: Sequence[tuple[Adapter, float]]) -> None:
    for adapter, weight in adapters:
        beyond = adapter.beyond_lora("dora", "trained", "tokens", "copies")
        if beyond is not None and (len(adapters) > 1 or weight != 1):
            raise SaigaError(
                f"{adapter.directory} uses {beyond}, which can be neither added to other adapters nor weighted. "
                "Give it alone and with a weight of 1."
            )


def _require_fit(base_dir: Path, merged: Merged, adapter: Adapter) -> None:
    names, shapes = merged.names, merged.shapes
    if merged.is_tied:
        shapes[names.head] = shapes[names.embeddings]
    changed, both = adapter.changed(), {names.embeddings, names.head} & shapes.keys()
    for name in both & changed.keys():
        (rows, *width), (base_rows, *base_width) = changed[name], merged.base.stored[names.embeddings].shape
        if rows != base_rows and width == base_width and not all(map(merged.replacement, both)):
            raise SaigaError(
                f"{adapter.directory} was trained with a vocabulary of {rows} tokens, but the base {base_dir} has "
                f"{base_rows}, and the adapter does not contain all resized embeddings. Save it again with "
                "save_embedding_layers=True, or give the resized base as base_source."
            )
    for name, (_, ids) in adapter.tokens.items():
        if name not in shapes or not all(0 <= token < shapes[name][0] for token in ids):
            raise SaigaError(f"{adapter.directory} replaces tokens {ids} of {name}, which the base {base_dir} lacks.")
    for name, wanted in changed.items():
        if (found := shapes.get(name)) != wanted:
            problem = "no such tensor" if found is None else f"the shape {list(found)} there"
            raise SaigaError(
                f"{adapter.directory} changes {name} of shape {list(wanted)}, but the base {base_dir} has {problem}: "
                f"it is the adapter of another base. It was trained on {adapter.trained_on}. Give the adapter that "
                "belongs to `model` and base_source, or none."
            )
