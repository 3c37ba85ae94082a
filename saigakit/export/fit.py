"""Estimate which quant type and context length fit into the memory of a small machine."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple, Self

from saigakit.core import manifest
from saigakit.core.display import Table
from saigakit.core.lazy import mpl_figure
from saigakit.core.workspace import GIB
from saigakit.llamacpp import quantization
from saigakit.weights.memory import CacheType
from saigakit.weights.model_shape import ModelShape

MACHINES = (6, 8, 16)  # GiB of RAM
CONTEXTS = (2048, 4096, 8192, 16384, 32768)  # the least is a conversation of a few pages
SHOWN = tuple(name for name in quantization.QUANT_TYPES if name not in ("F32", "BF16", "F16"))
SYSTEM = 1536 * 2**20  # bytes for the operating system and its desktop: an allowance, not measured
_CACHE_BYTES: Mapping[CacheType, float] = {"f16": 2, "q8_0": 34 / 32}  # per number; q8_0 has a scale for every 32
_BLOCK = 32  # numbers in a block of q8_0; llama.cpp refuses a cache whose head_dim is not a multiple
_BATCH = 512  # tokens that llama.cpp computes at a time, its n_ubatch
_TOKEN_BYTES = 170  # of a token's text in llama.cpp's tables: measured, 5 MB for 32,000 tokens and 21 for 128,256


class Needs(NamedTuple):
    """Bytes of RAM that a process needs to answer; `total` includes the system."""

    weights: int  # of the file, which is mapped; pages that llama.cpp has repacked are given back
    cache: int  # keys and values of the complete context
    buffers: int  # activations of one batch, and the vocabulary

    @classmethod
    def of(cls, shape: ModelShape, file_bytes: int, n_ctx: int, cache_type: CacheType = "f16") -> Self:
        """On a CPU with flash attention, as `infer.load` sets it. benchmarks/fit.py compares it with llama.cpp."""
        keys = shape.kv_heads * shape.head_dim
        # Gate, up and their product; the residual stream and its norm; new keys and values; the mask in float16.
        bytes_per_token = 4 * (3 * shape.intermediate + 2 * shape.hidden + 2 * keys) + 2 * n_ctx
        quantised_input = 1.14 * shape.intermediate  # of the widest product, as q8_K
        return cls(
            weights=file_bytes,
            cache=int(2 * shape.layers * keys * _CACHE_BYTES[cache_type] * n_ctx),
            buffers=int(_BATCH * (bytes_per_token + quantised_input)) + _TOKEN_BYTES * shape.vocabulary,
        )

    @property
    def resident(self) -> int:
        return self.weights + self.cache + self.buffers

    @property
    def total(self) -> int:
        return self.resident + SYSTEM

    def fits(self, machine_gib: float) -> bool:
        return self.total <= machine_gib * GIB


class Choice(NamedTuple):
    """A quant type and how to load its file on a machine."""

    quant_type: str
    n_ctx: int
    cache_type: CacheType
    needs: Needs
    machine_gib: float

    @property
    def fits(self) -> bool:
        return self.needs.fits(self.machine_gib)

    @property
    def free_mib(self) -> int:
        return max(0, int((self.machine_gib * GIB - self.needs.total) / 2**20))

    def describe(self) -> str:
        needed = f"{self.needs.total / GIB:.1f} GiB, including {SYSTEM / GIB:.1f} GiB for the system"
        if self.fits:
            return f"{self}: needs {needed}, and fits a machine with {self.machine_gib:g} GiB."
        return f"{self}: DOES NOT FIT a machine with {self.machine_gib:g} GiB; it needs {needed}."

    def __str__(self) -> str:
        cache = "" if self.cache_type == "f16" else f", KV cache in {self.cache_type}"
        return f"{self.quant_type} with {self.n_ctx} tokens of context{cache}"


class ModelFiles(NamedTuple):
    """The size of a model's file in each quant type, and what else its memory depends on."""

    shape: ModelShape
    longest: int  # tokens of context that the model was trained for
    files: Mapping[str, int]  # quant type, of quantization.QUANT_TYPES, to bytes

    @property
    def least_context(self) -> int:
        return min(CONTEXTS[0], self.longest)

    @property
    def _cache_types(self) -> list[CacheType]:
        """Without q8_0 where llama.cpp refuses it."""
        return [name for name in _CACHE_BYTES if name == "f16" or self.shape.head_dim % _BLOCK == 0]

    def needs(self, quant_type: str, n_ctx: int) -> dict[CacheType, Needs]:
        """By type of KV cache."""
        return {name: Needs.of(self.shape, self.files[quant_type], n_ctx, name) for name in self._cache_types}

    def best_on(self, machine_gib: float) -> Choice:
        """The best quant type that fits, in f16 if possible, and its longest context; else what needs least."""
        by_quality = [name for name in quantization.QUANT_TYPES if name in self.files]
        contexts = [length for length in reversed(CONTEXTS) if length <= self.longest] or [self.least_context]
        smallest = min(self.files, key=lambda name: self.files[name])
        least = (smallest, self._cache_types[-1], self.least_context)
        wanted = [*product(by_quality, self._cache_types, contexts), least]
        choices = [
            Choice(name, n_ctx, cache, self.needs(name, n_ctx)[cache], machine_gib) for name, cache, n_ctx in wanted
        ]
        return next((choice for choice in choices if choice.fits), choices[-1])

    def choose(self) -> Choice:
        """The best on the smallest of MACHINES that any type fits; if none does, what needs least."""
        best = [self.best_on(machine) for machine in MACHINES]
        return next((choice for choice in best if choice.fits), best[-1])

    def recommend(self) -> str:
        smallest, reserve = MACHINES[0], f"{SYSTEM / GIB:.1f} GiB are left for the system"
        best, choice = self.best_on(smallest), self.choose()
        if best.fits:
            return f"On {smallest} GiB: {best}: {best.needs.resident / GIB:.2f} GiB resident; {reserve}."
        problem = f"Nothing fits {smallest} GiB ({reserve}): even {best} needs {best.needs.total / GIB:.1f} GiB."
        remedy = f"On {choice.machine_gib:g} GiB: {choice}." if choice.fits else "Use a smaller model."
        return f"{problem} {remedy}"

    def table(self) -> Table:
        """GiB by quant type and context, part by part, with both types of cache, and the smallest machine that fits."""
        rows = []
        contexts = [length for length in CONTEXTS[:2] if length <= self.longest] or [self.longest]
        for (quant_type, size), n_ctx in product(self.files.items(), contexts):
            needs = self.needs(quant_type, n_ctx)
            by_cache = [needs.get(cache_type) for cache_type in _CACHE_BYTES]
            caches = [_gib(each.cache) if each else "–" for each in by_cache]
            totals = [_gib(each.total) if each else "–" for each in by_cache]
            parts = (_gib(size), *caches, _gib(needs["f16"].buffers), _gib(SYSTEM))
            machine, cache_type = _smallest_machine(needs)
            fits = f"more than {MACHINES[-1]} GB" if machine is None else f"{machine} GB"
            fits += "" if cache_type == "f16" else f" with KV {cache_type}"
            rows.append((quant_type, f"{n_ctx}", *parts, *totals, fits))
        columns = ("weights", "KV f16", "KV q8_0", "buffers", "system", "total, KV f16", "total, KV q8_0")
        note = f"GiB; the system's share is an allowance. {self.recommend()}"
        return Table(("type", "context", *columns, "fits"), rows, note)

    def plot(self) -> "mpl_figure.Figure":
        """Bars of GiB by quant type against MACHINES; with a q8_0 cache too where that fits a smaller machine."""
        bars = {}
        for quant_type in self.files:
            needs = self.needs(quant_type, self.least_context)
            bars[quant_type] = needs["f16"]
            if _smallest_machine(needs)[1] == "q8_0":
                bars[f"{quant_type}, KV q8_0"] = needs["q8_0"]
        parts = {
            "веса / weights": ([each.weights for each in bars.values()], "#1a73e8"),
            "контекст / context": ([each.cache for each in bars.values()], "#188038"),
            "буферы / buffers": ([each.buffers for each in bars.values()], "#9aa0a6"),
            "система / system": ([SYSTEM for _ in bars], "#e8eaed"),
        }
        figure = mpl_figure.Figure(figsize=(9, 0.42 * len(bars) + 2.0), layout="constrained")
        axes, left = figure.subplots(), [0.0] * len(bars)
        for label, (sizes, colour) in parts.items():
            axes.barh(list(bars), [size / GIB for size in sizes], left=left, color=colour, label=label)
            left = [before + size / GIB for before, size in zip(left, sizes, strict=True)]
        for machine in MACHINES:
            axes.axvline(machine, color="#d93025", linestyle="--", linewidth=1)
            place = (machine, 1.0)
            axes.annotate(f"{machine} GB", place, xycoords=("data", "axes fraction"), color="#d93025", fontsize=9)
        axes.set_xlim(0, max(MACHINES[-1], *left) * 1.05)
        axes.invert_yaxis()
        axes.set_xlabel("ГиБ / GiB")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", fontsize=9)
        n_ctx = self.least_context
        title = (
            f"Поместится ли? Память при контексте {n_ctx} токенов\nDoes it fit? Memory with {n_ctx} tokens of context"
        )
        figure.suptitle(title, fontsize=11)
        return figure


def memory_table(stage_dir: Path) -> Table:
    """What the model in a finished 03_merge_gguf needs in each quant type."""
    memory = manifest.read(stage_dir)["memory"]
    return ModelFiles(shape=ModelShape(**memory["shape"]), longest=memory["longest"], files=memory["files"]).table()


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _smallest_machine(needs: Mapping[CacheType, Needs]) -> tuple[int | None, CacheType]:
    """The first of MACHINES that it fits, and with which type of cache."""
    for machine, (cache_type, each) in product(MACHINES, needs.items()):
        if each.fits(machine):
            return machine, cache_type
    return None, "f16"
