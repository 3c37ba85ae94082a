"""A model's shapes and the sizes of its files into an answer to: does it fit a machine of 6 GB?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from saigakit.core import manifest
from saigakit.core.display import Table
from saigakit.errors import SaigaError
from saigakit.llamacpp import quantization
from saigakit.weights.memory import CacheType
from saigakit.weights.model_shape import ModelShape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
MACHINES = (6, 8, 16)  # GiB of RAM
CONTEXTS = (2048, 4096, 8192, 16384, 32768)
SHOWN = tuple(name for name in quantization.QUANT_TYPES if name not in ("F32", "BF16", "F16"))  # beside those made
LEAST_CONTEXT = CONTEXTS[0]  # a conversation of some pages
SYSTEM = 1536 * 2**20  # of the operating system and its desktop: an allowance, not measured
_CACHE_BYTES: Mapping[CacheType, float] = {"f16": 2, "q8_0": 34 / 32}  # of a number; q8_0 has a scale for 32
_BLOCK = 32  # numbers of a block of q8_0; llama.cpp refuses a cache whose heads are no whole blocks
_BATCH = 512  # tokens that llama.cpp computes at a time, its n_ubatch
_TOKEN_BYTES = 170  # of a token's text in llama.cpp's tables: measured, 5 MB of 32,000 and 21 of 128,256


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes of RAM of a process that answers, and of the system beside it."""

    weights: int  # of the file, which is mapped; pages that llama.cpp has copied into another order are given back
    cache: int  # keys and values of the whole context
    buffers: int  # of one batch between layers, and the vocabulary

    @classmethod
    def of(cls, shape: ModelShape, file_bytes: int, n_ctx: int, cache_type: CacheType = "f16") -> Self:
        """On a CPU with flash attention, as `infer.load` sets it. Compared with llama.cpp in benchmarks/fit.py."""
        keys = shape.kv_heads * shape.head_dim
        # Gate, up and their product; what goes around them and into them; new keys and values; the mask in float16.
        of_a_token = 4 * (3 * shape.intermediate + 2 * shape.hidden + 2 * keys) + 2 * n_ctx
        quantised = 1.14 * shape.intermediate  # the input of the widest product, as q8_K
        return cls(
            weights=file_bytes,
            cache=int(2 * shape.layers * keys * _CACHE_BYTES[cache_type] * n_ctx),
            buffers=int(_BATCH * (of_a_token + quantised)) + _TOKEN_BYTES * shape.vocabulary,
        )

    @property
    def resident(self) -> int:
        return self.weights + self.cache + self.buffers

    @property
    def total(self) -> int:
        return self.resident + SYSTEM

    def fits(self, machine_gib: float) -> bool:
        return self.total <= machine_gib * GIB


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A file and how to load it on a machine."""

    quant_type: str
    n_ctx: int
    cache_type: CacheType
    needs: Needs
    machine_gib: float

    @property
    def fits(self) -> bool:
        return self.needs.fits(self.machine_gib)

    @property
    def left_mib(self) -> int:
        """What is free beside it and the system."""
        return max(0, int((self.machine_gib * GIB - self.needs.total) / 2**20))

    def in_words(self) -> str:
        needed = f"{self.needs.total / GIB:.1f} GiB, {SYSTEM / GIB:.1f} of them for the system"
        if self.fits:
            return f"{self}: needs {needed}, and fits a machine of {self.machine_gib:g} GiB."
        return f"{self}: DOES NOT FIT a machine of {self.machine_gib:g} GiB; needs {needed}."

    def __str__(self) -> str:
        cache = "" if self.cache_type == "f16" else f", keys and values in {self.cache_type}"
        return f"{self.quant_type} with {self.n_ctx} tokens of context{cache}"


def best(shape: ModelShape, by_type: Mapping[str, int], *, longest: int, machine_gib: float = MACHINES[0]) -> Choice:
    """The quant type of highest quality that fits with LEAST_CONTEXT tokens, and its longest context there.

    `by_type`: bytes of the file in each type. Keys and values stay in float16 where that is enough for it. Where
    nothing `fits`, it is what needs least.
    """
    least = min(LEAST_CONTEXT, longest)
    for quant_type in filter(by_type.__contains__, quantization.QUANT_TYPES):
        for cache_type in _cache_types(shape):
            fitting = [
                choice
                for n_ctx in sorted({least, *(length for length in CONTEXTS if least <= length <= longest)})
                if (choice := _choice(shape, by_type, quant_type, n_ctx, cache_type, machine_gib)).fits
            ]
            if fitting:
                return fitting[-1]
    smallest = min(by_type, key=lambda name: by_type[name])
    return _choice(shape, by_type, smallest, least, _cache_types(shape)[-1], machine_gib)


def _cache_types(shape: ModelShape) -> list[CacheType]:
    return [name for name in _CACHE_BYTES if name == "f16" or shape.head_dim % _BLOCK == 0]


def _choice(
    shape: ModelShape,
    by_type: Mapping[str, int],
    quant_type: str,
    n_ctx: int,
    cache_type: CacheType,
    machine_gib: float,
) -> Choice:
    needs = Needs.of(shape, by_type[quant_type], n_ctx, cache_type)
    return Choice(quant_type=quant_type, n_ctx=n_ctx, cache_type=cache_type, needs=needs, machine_gib=machine_gib)


def chosen(shape: ModelShape, by_type: Mapping[str, int], *, longest: int) -> Choice:
    """The best on the smallest of MACHINES that anything fits; where nothing does, what needs least."""
    found = [best(shape, by_type, longest=longest, machine_gib=machine) for machine in MACHINES]
    return next((choice for choice in found if choice.fits), found[-1])


def in_words(shape: ModelShape, by_type: Mapping[str, int], *, longest: int, machine_gib: float = MACHINES[0]) -> str:
    """One recommendation."""
    choice = best(shape, by_type, longest=longest, machine_gib=machine_gib)
    allowance = f"{SYSTEM / GIB:.1f} GiB are left to the system"
    if choice.fits:
        return f"On {machine_gib:g} GiB: {choice}: {choice.needs.resident / GIB:.2f} GiB resident; {allowance}."
    larger = chosen(shape, by_type, longest=longest)
    return (
        f"Nothing of this model fits {machine_gib:g} GiB ({allowance}): even {choice} needs "
        f"{choice.needs.total / GIB:.1f} GiB. "
        + (f"On {larger.machine_gib:g} GiB: {larger}." if larger.fits else "Take a smaller model.")
    )


def table(
    shape: ModelShape, by_type: Mapping[str, int], *, longest: int, contexts: Sequence[int] = CONTEXTS[:3]
) -> Table:
    """GiB of each quant type and context, part by part, with both types of cache; and the machine that it fits."""
    require_sizes(by_type)
    rows = []
    for quant_type, size in by_type.items():
        for n_ctx in [length for length in contexts if length <= longest] or [longest]:
            found = _by_cache_type(shape, size, n_ctx)
            both = [found.get(cache_type) for cache_type in _CACHE_BYTES]
            caches = (_gib(needs.cache) if needs else "–" for needs in both)
            totals = (_gib(needs.total) if needs else "–" for needs in both)
            parts = (_gib(size), *caches, _gib(found["f16"].buffers), _gib(SYSTEM))
            rows.append((quant_type, f"{n_ctx}", *parts, *totals, _said_of_machine(found)))
    columns = ("weights", "KV f16", "KV q8_0", "buffers", "system")
    header = ("type", "context", *columns, "all, KV f16", "all, KV q8_0", "fits")
    note = "GiB; that for the system is an allowance. " + in_words(shape, by_type, longest=longest)
    return Table(header, rows, note)


def memory_table(stage_dir: Path) -> Table:
    """What each quant type of the model in a 03_merge_gguf would need, at 2048 and 4096 tokens of context."""
    memory = manifest.read(stage_dir)["memory"]
    return table(ModelShape(**memory["shape"]), memory["files"], longest=memory["longest"], contexts=CONTEXTS[:2])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _by_cache_type(shape: ModelShape, file_bytes: int, n_ctx: int) -> dict[CacheType, Needs]:
    return {cache_type: Needs.of(shape, file_bytes, n_ctx, cache_type) for cache_type in _cache_types(shape)}


def _said_of_machine(found: Mapping[CacheType, Needs]) -> str:
    machine, cache_type = _machine(found)
    if machine is None:
        return f"more than {MACHINES[-1]} GB"
    return f"{machine} GB" + ("" if cache_type == "f16" else f" with KV {cache_type}")


def _machine(found: Mapping[CacheType, Needs]) -> tuple[int | None, CacheType]:
    """The smallest that it fits, and the type of cache with which it does."""
    for machine in MACHINES:
        for cache_type, needs in found.items():
            if needs.fits(machine):
                return machine, cache_type
    return None, "f16"


def require_sizes(by_type: Mapping[str, int]) -> None:
    """Raises SaigaError where a type is unknown or there is none."""
    if unknown := set(by_type) - set(quantization.QUANT_TYPES):
        raise SaigaError(f"quant_type={min(unknown)!r} is unknown; use some of {', '.join(quantization.QUANT_TYPES)}.")
    if not by_type:
        raise SaigaError("There is no quant type to look at; give one at least.")


def plot(shape: ModelShape, by_type: Mapping[str, int], *, n_ctx: int = LEAST_CONTEXT) -> "Figure":
    """Bars in GiB: what each quant type needs at `n_ctx` tokens, against machines of 6, 8 and 16 GB.

    With keys and values in f16, and below it in q8_0 too where that fits a smaller machine.
    """
    from matplotlib.figure import Figure

    require_sizes(by_type)
    bars = _bars(shape, by_type, n_ctx)
    parts = {
        "веса / weights": ([needs.weights for needs in bars.values()], "#1a73e8"),
        "контекст / context": ([needs.cache for needs in bars.values()], "#188038"),
        "буферы / buffers": ([needs.buffers for needs in bars.values()], "#9aa0a6"),
        "система / system": ([SYSTEM for _ in bars], "#e8eaed"),
    }
    figure = Figure(figsize=(9, 0.42 * len(bars) + 2.0), layout="constrained")
    axes, left = figure.subplots(), [0.0] * len(bars)
    for label, (sizes, colour) in parts.items():
        axes.barh(list(bars), [size / GIB for size in sizes], left=left, color=colour, label=label)
        left = [before + size / GIB for before, size in zip(left, sizes, strict=True)]
    for machine in MACHINES:
        axes.axvline(machine, color="#d93025", linestyle="--", linewidth=1)
        axes.annotate(f"{machine} GB", (machine, 1.0), xycoords=("data", "axes fraction"), color="#d93025", fontsize=9)
    axes.set_xlim(0, max(MACHINES[-1], *left) * 1.05)
    axes.invert_yaxis()
    axes.set_xlabel("ГиБ / GiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=9)
    figure.suptitle(
        f"Поместится ли? Память при контексте {n_ctx} токенов\nwill it fit? memory with {n_ctx} tokens of context",
        fontsize=11,
    )
    return figure


def _bars(shape: ModelShape, by_type: Mapping[str, int], n_ctx: int) -> dict[str, Needs]:
    bars = {}
    for quant_type, size in by_type.items():
        found = _by_cache_type(shape, size, n_ctx)
        bars[quant_type] = found["f16"]
        if _machine(found)[1] == "q8_0":
            bars[f"{quant_type}, KV q8_0"] = found["q8_0"]
    return bars
