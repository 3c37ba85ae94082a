"""Estimate time, memory and disk of an export, and plot the sizes."""

import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit.core import workspace
from saigakit.core.display import Table
from saigakit.llamacpp import quantization, streaming
from saigakit.weights.tensors import Shards

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saigakit.weights.tensors import Shape

_NUMBERS = 1 << 19  # of the sample, about: a tenth of a second for the slowest type
_READ = 32 * 10**6  # bytes of the sample
_SLOW = (
    "This wheel of llama-cpp-python does not use AVX2, which this CPU has: quantising and answers are several times "
    "slower than they could be. Install a wheel that was built with it."
)


def plan(
    files: Mapping[str, tuple[Mapping[str, str], int]],
    shapes: Mapping[str, "Shape"],
    base: Shards,
    memory: int,
    read: streaming.ReadRows,
) -> Table:
    """`files`: quant type to the types of its tensors and its bytes; `memory`: bytes that are held."""
    seconds_per_number = _measured({ggml for types, _ in files.values() for ggml in types.values()}, shapes, read)
    reading_s = base.bytes_on_disk / _read_speed(max(base.files, key=lambda file: file.stat().st_size))
    numbers = sum(map(prod, shapes.values()))
    cores = quantization.usable_cores()
    rows = [("read · читается", f"{base.bytes_on_disk / workspace.GB:.2f} GB", f"{reading_s:.0f} s")]
    merging_s = numbers * seconds_per_number["read"] / cores
    rows.append(("merge · слияние", f"{numbers / 1e9:.2f}·10⁹", f"{merging_s:.0f} s"))
    computing_s = merging_s
    for quant_type, (types, size) in files.items():
        took = sum(prod(shape) * seconds_per_number[types[name]] for name, shape in shapes.items()) / cores
        computing_s += took
        rows.append((f"write {quant_type}", f"{size / workspace.GB:.2f} GB", f"{took:.0f} s"))
    rows.append(("together · всего", f"{memory / workspace.GB:.1f} GB RAM", f"{max(computing_s, reading_s):.0f} s"))
    note = f"Estimated on a sample; reading and computing on {cores} cores go on at once."
    return Table(("03_merge_gguf", "how much", "about"), rows, f"{note} {_SLOW}" if is_wheel_slow() else note)


def _measured(types: set[str], shapes: Mapping[str, "Shape"], read: streaming.ReadRows) -> dict[str, float]:
    """Seconds a number of each type takes on one core, and of "read": reading and merging it."""
    name, shape = max(shapes.items(), key=lambda item: (item[0].startswith("blk."), prod(item[1])))
    rows = slice(0, min(shape[0], max(1, _NUMBERS // prod(shape[1:]))))
    start = time.perf_counter()
    read(name, slice(0, 1))  # where it goes into a dequantised base, this looks at the whole matrix
    prepared = time.perf_counter()
    sample = read(name, rows)
    taken = {"read": (prepared - start) / prod(shape) + (time.perf_counter() - prepared) / sample.size}
    for ggml_type in types:
        usable = sample[:, : sample.shape[1] // 256 * 256] if sample.ndim == 2 else sample[None]
        if usable.size == 0:
            usable = sample.reshape(1, -1)[:, : sample.size // 256 * 256]
        start = time.perf_counter()
        quantization.quantise(usable, ggml_type)
        taken[ggml_type] = (time.perf_counter() - start) / usable.size
    return taken


def _read_speed(file: Path) -> float:
    """Bytes a second, from the middle of a file; fast where it is in memory already."""
    with file.open("rb", buffering=0) as stream:
        stream.seek(file.stat().st_size // 2)
        start = time.perf_counter()
        count = len(stream.read(_READ))
        return count / (time.perf_counter() - start)


def is_wheel_slow() -> bool:
    """Whether the CPU has AVX2 and llama.cpp's build does not use it."""
    import llama_cpp

    cpuinfo = Path("/proc/cpuinfo")
    has = cpuinfo.exists() and " avx2 " in f" {cpuinfo.read_text(encoding='utf-8')} ".replace("\n", " ")
    return has and b"AVX2 = 1" not in llama_cpp.llama_print_system_info()


_GREY, _BLUE, _GREEN, _PALE = "#9aa0a6", "#1a73e8", "#188038", "#ceead6"


def plot_sizes(base: int, adapter: int | None, by_quant_type: Mapping[str, int], made: str) -> "Figure":
    """Bars in bytes: the base on disk, the adapter, the GGUF that was made, and what other quant types would take."""
    from matplotlib.figure import Figure

    bars = [("база\nbase model", base, _GREY)]
    if adapter is not None:
        bars.append(("адаптер\nadapter", adapter, _BLUE))
    bars += [
        (f"{name}  ← model.gguf" if name == made else name, size, _GREEN if name == made else _PALE)
        for name, size in by_quant_type.items()
    ]
    labels, values, colours = zip(*bars, strict=True)
    unit, divisor = ("ГБ / GB", 1e9) if max(values) >= 1e9 else ("МБ / MB", 1e6)
    figure = Figure(figsize=(9, 0.42 * len(bars) + 1.4), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(labels, [value / divisor for value in values], color=colours)
    axes.bar_label(drawn, fmt="{:.2f}", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Размер модели: сделан {made}, остальные типы — для сравнения\n"
        f"size of the model: {made} was made, the other quant types are computed",
        fontsize=11,
    )
    return figure
