"""A model's shapes and the sizes of its files into an answer to: does it fit a machine of 6 GB?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from saigakit import manifest
from saigakit.errors import SaigaError
from saigakit.memory import Shape
from saigakit.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
MACHINES = (6, 8, 16)  # GiB of RAM
CONTEXTS = (2048, 4096, 8192, 16384, 32768)
SHOWN = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q2_K")  # best first
LEAST_CONTEXT = CONTEXTS[0]  # a conversation of some pages
SYSTEM = 1536 * 2**20  # of the operating system and its desktop: an allowance, not measured
CacheType = Literal["f16", "q8_0"]
_CACHE_BYTES: Mapping[CacheType, float] = {"f16": 2, "q8_0": 34 / 32}  # of a number; q8_0 has a scale for 32
_BATCH = 512  # tokens that llama.cpp computes at a time, its n_ubatch
_TOKEN_BYTES = 170  # of a token's text in llama.cpp's tables: measured, 5 MB of 32,000 and 21 of 128,256
# Best first: llama.cpp's own measurements of divergence put IQ4_XS before Q4_0, which is larger.
_BY_QUALITY = ("F32", "BF16", "F16", *SHOWN)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes of RAM of a process that answers, and of the system beside it."""

    weights: int  # of the file, which is mapped; pages that llama.cpp has copied into another order are given back
    cache: int  # keys and values of the whole context
    buffers: int  # of one batch between layers, and the vocabulary

    @classmethod
    def of(cls, shape: Shape, file_bytes: int, n_ctx: int, cache_type: CacheType = "f16") -> Self:
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


def context_that_fits(shape: Shape, file_bytes: int, *, longest: int, machine_gib: float = MACHINES[0]) -> int:
    """The longest of CONTEXTS, up to `longest` tokens that the model was trained for; the shortest where none fits."""
    lengths = [length for length in CONTEXTS if length <= longest] or [longest]
    fitting = [length for length in lengths if Needs.of(shape, file_bytes, length).fits(machine_gib)]
    return max(fitting, default=lengths[0])


def best(shape: Shape, by_type: Mapping[str, int], *, longest: int, machine_gib: float = MACHINES[0]) -> Choice | None:
    """The quant type of highest quality that fits with LEAST_CONTEXT tokens, and its longest context there.

    `by_type`: bytes of the file in each type. Keys and values stay in float16 where that is enough for it.
    """
    least = min(LEAST_CONTEXT, longest)
    for quant_type in filter(by_type.__contains__, _BY_QUALITY):
        for cache_type in _CACHE_BYTES:
            fitting = [
                Choice(quant_type=quant_type, n_ctx=n_ctx, cache_type=cache_type, needs=needs)
                for n_ctx in sorted({least, *(length for length in CONTEXTS if least <= length <= longest)})
                if (needs := Needs.of(shape, by_type[quant_type], n_ctx, cache_type)).fits(machine_gib)
            ]
            if fitting:
                return fitting[-1]
    return None


def in_words(shape: Shape, by_type: Mapping[str, int], *, longest: int, machine_gib: float = MACHINES[0]) -> str:
    """One recommendation."""
    allowance = f"{SYSTEM / GIB:.1f} GiB are left to the system"
    if (choice := best(shape, by_type, longest=longest, machine_gib=machine_gib)) is None:
        smallest = min(by_type, key=lambda name: by_type[name])
        needs = Needs.of(shape, by_type[smallest], min(LEAST_CONTEXT, longest), "q8_0")
        return (
            f"Nothing of this model fits {machine_gib:g} GiB ({allowance}): even {smallest} needs "
            f"{needs.total / GIB:.1f} GiB. Take a smaller model."
        )
    cache = "" if choice.cache_type == "f16" else ", keys and values in q8_0"
    return (
        f"On {machine_gib:g} GiB: {choice.quant_type} with {choice.n_ctx} tokens of context{cache}: "
        f"{choice.needs.resident / GIB:.2f} GiB resident; {allowance}."
    )


def table(shape: Shape, by_type: Mapping[str, int], *, longest: int, contexts: Sequence[int] = CONTEXTS[:3]) -> Table:
    """GiB of each quant type and context, system included, with both types of cache; and the machine that it fits."""
    require_sizes(by_type)
    rows = []
    for quant_type, size in by_type.items():
        for n_ctx in [length for length in contexts if length <= longest] or [longest]:
            found = {cache_type: Needs.of(shape, size, n_ctx, cache_type) for cache_type in _CACHE_BYTES}
            rows.append(
                (
                    quant_type,
                    f"{size / GIB:.2f}",
                    f"{n_ctx}",
                    *(f"{needs.total / GIB:.2f}" for needs in found.values()),
                    _machine(found),
                )
            )
    header = ("type", "file, GiB", "context", "KV f16, GiB", "KV q8_0, GiB", "fits")
    note = f"In all, {SYSTEM / GIB:.1f} GiB for the system included (an allowance). " + in_words(
        shape, by_type, longest=longest
    )
    return Table(header, rows, note)


def of_stage(stage_dir: Path) -> Table:
    """What each quant type of the model in a 03_merge_gguf would need, at 2048 and 4096 tokens of context."""
    memory = manifest.read(stage_dir)["memory"]
    return table(Shape(**memory["shape"]), memory["files"], longest=memory["longest"], contexts=CONTEXTS[:2])


def _machine(found: Mapping[CacheType, Needs]) -> str:
    for machine in MACHINES:
        for cache_type, needs in found.items():
            if needs.fits(machine):
                return f"{machine} GB" + ("" if cache_type == "f16" else " with KV q8_0")
    return f"more than {MACHINES[-1]} GB"


def require_sizes(by_type: Mapping[str, int]) -> None:
    """Raises SaigaError where a type is unknown or there is none."""
    if unknown := set(by_type) - set(_BY_QUALITY):
        raise SaigaError(f"quant_type={min(unknown)!r} is unknown; use some of {', '.join(_BY_QUALITY)}.")
    if not by_type:
        raise SaigaError("There is no quant type to look at; give one at least.")


def plot(shape: Shape, by_type: Mapping[str, int], *, n_ctx: int = LEAST_CONTEXT) -> "Figure":
    """Bars in GiB: what each quant type needs at `n_ctx` tokens, against machines of 6, 8 and 16 GB."""
    from matplotlib.figure import Figure

    require_sizes(by_type)
    found = [Needs.of(shape, size, n_ctx) for size in by_type.values()]
    parts = {
        "веса / weights": ([needs.weights for needs in found], "#1a73e8"),
        "контекст / context": ([needs.cache for needs in found], "#188038"),
        "буферы / buffers": ([needs.buffers for needs in found], "#9aa0a6"),
        "система / system": ([SYSTEM for _ in found], "#e8eaed"),
    }
    figure = Figure(figsize=(9, 0.42 * len(found) + 2.0), layout="constrained")
    axes, left = figure.subplots(), [0.0] * len(found)
    for label, (sizes, colour) in parts.items():
        axes.barh(list(by_type), [size / GIB for size in sizes], left=left, color=colour, label=label)
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
