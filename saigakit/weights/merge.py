"""A base model's shards and LoRA adapters into merged float32 tensors, one at a time or some rows of one."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, get_args

from saigakit.errors import SaigaError
from saigakit.weights import memory, nf4, tensors
from saigakit.weights.adapter import EMBEDDINGS, HEAD, Adapter
from saigakit.weights.tensors import Shape, Shards

if TYPE_CHECKING:
    import torch

    from saigakit.weights.tensors import Array

Into = Literal["original", "dequantized"]
Adapters = Path | Sequence[tuple[Path, float]] | None
_ROWS = 4096  # of embeddings that are looked at together
_KEPT = 4  # matrices' scales of nf4: the end of one is read while the next ones begin


@dataclass(frozen=True)
class Merged:
    """Base and adapters that fit each other; a tensor is computed when it is read.

    `into` is what the update is added to: the published weights, or those that a training in nf4 computed with in
    `number_format`. With several adapters the merged weight is W + the sum of weight * scale * B @ A.
    """

    base: Shards
    adapters: Sequence[tuple[Adapter, float]] = ()
    into: Into = "original"
    number_format: str = "float16"
    is_tied: bool = False  # the base uses its embeddings as its head
    folded: Adapter | None = None  # was in the base when that was quantised
    _scales: "dict[str, torch.Tensor]" = field(default_factory=dict, compare=False)  # of nf4's blocks
    _lengths: "dict[str, Array]" = field(default_factory=dict, compare=False)  # of DoRA's columns
    _lock: threading.RLock = field(default_factory=threading.RLock, compare=False)  # rows are read by many threads

    @classmethod
    def of(
        cls,
        base_dir: Path,
        adapters: Adapters,
        *,
        into: Into = "original",
        number_format: str = "float16",
        folded_rank: int = 0,
    ) -> Self:
        """Reads headers alone. `folded_rank`: of the one adapter, so many first ranks were folded into the base.

        Raises SaigaError for damaged files, the adapter of another base, and adapters that cannot be added up.
        """
        if into not in get_args(Into):
            raise SaigaError(f"merge_into={into!r} is unknown; use one of {', '.join(get_args(Into))}.")
        if into == "dequantized":
            nf4.import_bitsandbytes()  # where it is not installed, that is known before anything is read
        base = tensors.of_base(base_dir)
        given = [(adapters, 1.0)] if isinstance(adapters, Path) else list(adapters or ())
        opened = [(Adapter.of(directory), weight) for directory, weight in given]
        _require_addable(opened)
        made = cls(base, opened, into, number_format, bool(opened) and _is_tied(base_dir, opened))
        if folded_rank and into == "dequantized":
            ((adapter, weight),) = opened
            folded, rest = adapter.split(folded_rank)
            made = replace(made, adapters=[(rest, weight)], folded=folded)
        for adapter, _ in opened:
            _require_fit(base_dir, made, adapter)
        return made

    @cached_property
    def is_untied(self) -> bool:
        """Whether the base's one matrix became two: the adapter changes embeddings or head, and not both as one."""
        if not self.is_tied:
            return False
        return any(
            {EMBEDDINGS, HEAD} & adapter.updates.keys()
            or ({EMBEDDINGS, HEAD} & adapter.trained.keys() and not adapter.keeps_tied)
            for adapter, _ in self.adapters
        )

    @property
    def shapes(self) -> dict[str, Shape]:
        shapes = {name: stored.shape for name, stored in self.base.stored.items()}
        if self.is_untied:
            shapes[HEAD] = shapes[EMBEDDINGS]
        return shapes

    def read(self, name: str, rows: slice | None = None) -> "Array":
        """The merged tensor in float32, or these rows of it. Raises SaigaError where it is not finite."""
        import numpy as np
        import torch

        tensor = self._start(name, rows)
        for adapter, weight in self.adapters:
            if name in adapter.updates:
                adapter.add(tensor, name, rows, weight)
                self._scale(adapter, name, tensor, rows)
            if name in adapter.biases:
                stored, scale = adapter.biases[name]
                tensor = tensor + weight * scale * adapter.weights.read(stored, rows)
        is_finite = torch.from_numpy(tensor).sum().isfinite()  # quick; a sum of finite numbers may overflow
        if not is_finite and not np.isfinite(tensor).all():
            where = "".join(f" and {adapter.directory}" for adapter, _ in self.adapters if name in adapter.changed())
            raise SaigaError(
                f"{name} holds NaN or infinity after merging {self._file(name)}{where}: the training "
                "diverged or a file is damaged. Nothing was made; check the curve of 02_train or fetch the files again."
            )
        return tensor

    def _file(self, name: str) -> Path:
        return self.base.stored[name if name in self.base.stored else EMBEDDINGS].file

    def _start(self, name: str, rows: slice | None) -> "Array":
        """What the update is added to, in memory of its own."""
        if (source := self._replaced(name)) is not None:
            return source[0].read(source[1], rows)
        if self.is_untied and name == HEAD:
            name = EMBEDDINGS
        if self.into == "original" or not nf4.is_quantised(name, len(self.base.stored[name].shape)):
            return self.base.read(name, rows)
        return self._dequantised(name, rows or slice(None))

    def _dequantised(self, name: str, rows: slice) -> "Array":
        shape = self.base.stored[name].shape
        first, stop, _ = rows.indices(shape[0])
        start, end = first // nf4.BLOCK * nf4.BLOCK, min(-(-stop // nf4.BLOCK) * nf4.BLOCK, shape[0])
        with self._lock:
            if name not in self._scales:
                while len(self._scales) >= _KEPT:
                    del self._scales[next(iter(self._scales))]
                self._scales[name] = nf4.scales(partial(self._quantised_from, name), shape, self.number_format)
            scales = self._scales[name]
        of_rows = scales[start * shape[1] // nf4.BLOCK : -(-end * shape[1] // nf4.BLOCK)]
        made = nf4.dequantised(self._quantised_from(name, slice(start, end)), of_rows, self.number_format)
        return made[first - start : stop - start]

    def _quantised_from(self, name: str, rows: slice) -> "Array":
        matrix = self.base.read(name, rows)
        if self.folded is not None and name in self.folded.updates:
            self.folded.add(matrix, name, rows)
        return matrix

    def _replaced(self, name: str) -> tuple[Shards, str] | None:
        """Where the tensor is that stands in place of the base's. Of tied matrices a copy stands for both."""
        same = (name, EMBEDDINGS, HEAD) if self.is_tied and name in (EMBEDDINGS, HEAD) else (name,)
        for adapter, _ in self.adapters:
            if name in adapter.trained:
                return adapter.weights, adapter.trained[name]
            if name == EMBEDDINGS and self.is_tied and adapter.keeps_tied and HEAD in adapter.trained:
                return adapter.weights, adapter.trained[HEAD]
            if there := [adapter.copies[one] for one in same if one in adapter.copies]:
                return adapter.weights, there[0]
        return None

    def _scale(self, adapter: Adapter, name: str, updated: "Array", rows: slice | None) -> None:
        """With DoRA each row, and of embeddings each column, gets the trained length."""
        import numpy as np

        update = adapter.updates[name]
        if update.magnitude is None:
            return
        if update.of_embeddings:
            factors = adapter.weights.read(update.magnitude) / self._column_lengths(adapter, name)
        else:
            lengths = np.linalg.norm(updated, axis=1)
            factors = (adapter.weights.read(update.magnitude, rows) / lengths)[:, None]
        updated *= factors

    def _column_lengths(self, adapter: Adapter, name: str) -> "Array":
        import numpy as np

        with self._lock:
            if name in self._lengths:
                return self._lengths[name]
            count, columns = adapter.shape(name)
            squares = np.zeros(columns, np.float64)
            for first in range(0, count, _ROWS):
                rows = slice(first, first + _ROWS)
                merged = self._start(name, rows)
                adapter.add(merged, name, rows)
                squares += np.square(merged, dtype=np.float64).sum(0)
            lengths: Array = np.sqrt(squares).astype(np.float32)
            self._lengths[name] = lengths
        return lengths


def _is_tied(base_dir: Path, adapters: Sequence[tuple[Adapter, float]]) -> bool:
    """Asked of config.json only where it matters."""
    touched = any({EMBEDDINGS, HEAD} & adapter.changed().keys() for adapter, _ in adapters)
    return touched and memory.Shape.of(base_dir).tied


def _require_addable(adapters: Sequence[tuple[Adapter, float]]) -> None:
    for adapter, weight in adapters:
        beyond = adapter.beyond_lora()
        if beyond is not None and (len(adapters) > 1 or weight != 1):
            raise SaigaError(
                f"{adapter.directory} uses {beyond}, which can be neither added to other adapters nor weighted. "
                "Give it alone and with a weight of 1."
            )


def _require_fit(base_dir: Path, merged: Merged, adapter: Adapter) -> None:
    hint = (
        f"The adapter was trained on {adapter.trained_on}. Give the adapter that belongs to `model` and base_source, "
        "or adapter=None."
    )
    there = merged.shapes | ({HEAD: merged.shapes[EMBEDDINGS]} if merged.is_tied else {})
    for name, wanted in adapter.changed().items():
        if name not in there:
            raise SaigaError(
                f"{adapter.directory} changes {name} {list(wanted)}, and the base {base_dir} has no such tensor: "
                f"it is the adapter of another base. {hint}"
            )
        if there[name] != wanted:
            raise SaigaError(
                f"{adapter.directory} changes {name} of shape {list(wanted)}, and in the base {base_dir} its shape is "
                f"{list(there[name])}: it is the adapter of another base. {hint}"
            )
