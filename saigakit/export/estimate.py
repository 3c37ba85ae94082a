"""Estimate the time, memory and disk that an export takes, and plot the sizes."""

import time
from collections.abc import Mapping
from math import prod
from pathlib import Path

from saigakit.core import workspace
from saigakit.core.display import Table
from saigakit.core.lazy import llama_cpp, mpl_figure
from saigakit.export.gguf_export import Export
from saigakit.llamacpp import quantization, streaming
from saigakit.weights.tensors import Shape

_NUMBERS = 1 << 19  # in the sample, about: a tenth of a second for the slowest type
_READ = 32 * 10**6  # bytes of the sample
_SLOW = (
    "This build of llama-cpp-python does not use AVX2, which this CPU has: quantising and answering are several times "
    "slower. Install a build with AVX2."
)
_GREY, _BLUE, _GREEN, _PALE = "#9aa0a6", "#1a73e8", "#188038", "#ceead6"


def estimate_table(export: Export) -> Table:
    """What is read and written, and about how long it takes, measured on a sample."""
    base, shapes = export.merged.base, export.shapes
    types = {quant_type: export.types(quant_type) for quant_type in export.quant_types}
    ggml_types = {ggml_type for each in types.values() for ggml_type in each.values()}
    seconds_per_number = _seconds_per_number(ggml_types, shapes, export.read)
    reading_s = base.bytes_on_disk / _read_speed(max(base.files, key=lambda file: file.stat().st_size))
    numbers = sum(map(prod, shapes.values()))
    cores = quantization.usable_cores()
    computing_s = numbers * seconds_per_number["read"] / cores
    rows = [
        ("чтение · read", f"{base.bytes_on_disk / workspace.GB:.2f} GB", f"{reading_s:.0f} s"),
        ("слияние · merge", f"{numbers / 1e9:.2f}·10⁹", f"{computing_s:.0f} s"),
    ]
    for quant_type, ggml_type_of in types.items():
        took = sum(prod(shape) * seconds_per_number[ggml_type_of[name]] for name, shape in shapes.items()) / cores
        computing_s += took
        size = f"{export.bytes(quant_type) / workspace.GB:.2f} GB"
        rows.append((f"запись · write {quant_type}", size, f"{took:.0f} s"))
    rows.append(("всего · total", f"{export.memory / workspace.GB:.1f} GB RAM", f"{max(computing_s, reading_s):.0f} s"))
    is_slow = "avx2" in workspace.cpu_flags() and b"AVX2 = 1" not in llama_cpp.llama_print_system_info()
    note = f"Оценка по выборке. · Estimated from a sample, on {cores} cores. {_SLOW if is_slow else ''}".rstrip()
    return Table(("03_merge_gguf", "объём · amount", "оценка времени · estimated time"), rows, note)


def _seconds_per_number(types: set[str], shapes: Mapping[str, Shape], read: streaming.ReadRows) -> dict[str, float]:
    """Quantising to each type on one core; "read" is reading and merging."""
    name, shape = max(shapes.items(), key=lambda item: (item[0].startswith("blk."), prod(item[1])))
    rows = slice(0, min(shape[0], max(1, _NUMBERS // prod(shape[1:]))))
    start = time.perf_counter()
    read(name, slice(0, 1))  # merging into a dequantised base reads the complete matrix first
    prepared = time.perf_counter()
    sample = read(name, rows)
    taken = {"read": (prepared - start) / prod(shape) + (time.perf_counter() - prepared) / sample.size}
    usable = sample.reshape(1, -1)[:, : sample.size // 256 * 256]
    for ggml_type in types:
        start = time.perf_counter()
        quantization.quantise(usable, ggml_type)
        taken[ggml_type] = (time.perf_counter() - start) / usable.size
    return taken


def _read_speed(file: Path) -> float:
    """Bytes per second in the middle of the file; high if it is in the page cache."""
    with file.open("rb", buffering=0) as stream:
        stream.seek(file.stat().st_size // 2)
        start = time.perf_counter()
        count = len(stream.read(_READ))
        return count / (time.perf_counter() - start)


def plot_sizes(base: int, adapter: int | None, by_quant_type: Mapping[str, int], made: str) -> "mpl_figure.Figure":
    """Bars of bytes: the base, the adapter, the GGUF that was made and the other quant types."""
    bars = [("база\nbase model", base, _GREY)]
    if adapter is not None:
        bars.append(("адаптер\nadapter", adapter, _BLUE))
    bars += [
        (f"{name}  ← model.gguf" if name == made else name, size, _GREEN if name == made else _PALE)
        for name, size in by_quant_type.items()
    ]
    labels, values, colours = zip(*bars, strict=True)
    unit, divisor = ("ГБ / GB", 1e9) if max(values) >= 1e9 else ("МБ / MB", 1e6)
    figure = mpl_figure.Figure(figsize=(9, 0.42 * len(bars) + 1.4), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(labels, [value / divisor for value in values], color=colours)
    axes.bar_label(drawn, fmt="{:.2f}", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Размер модели: сделан {made}, остальные типы — для сравнения\n"
        f"Size of the model: {made} was made, the other quant types are computed",
        fontsize=11,
    )
    return figure
