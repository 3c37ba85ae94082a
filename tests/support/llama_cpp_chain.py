"""llama.cpp's own way to a quantised file: its converter, its quantiser, and what a GGUF holds, byte by byte.

And its own Jinja, compiled of its source.
"""

import ctypes
import hashlib
import importlib.metadata
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import gguf
import llama_cpp
import pytest

_CONVERTER = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
_SERVER = ("common/arg.cpp",)
_JINJA = ("common/jinja/", "common/json.", "common/unicode.", "vendor/nlohmann/", "ggml/include/ggml.h")
# Of each template with its variables the text, or {"error": …}.
_RENDERER = """
#include <cstdlib>
#include <iostream>
#include <iterator>
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

extern "C" void ggml_abort(const char *, int, const char *, ...) { std::abort(); }

static common_json rendered(const common_json & job) {
    try {
        const auto source = job.at("template").get<std::string>();
        jinja::lexer lexer;
        auto tokens = lexer.tokenize(source);
        auto program = jinja::parse_from_tokens(tokens);
        jinja::context context(source);
        jinja::global_from_json(context, job.at("variables"), true);
        jinja::runtime runtime(context);
        const jinja::value results = runtime.execute(program);
        return runtime.gather_string_parts(results)->as_string().str();
    } catch (const std::exception & error) {
        return common_json{{"error", std::string(error.what())}};
    }
}

int main() {
    const std::string input{std::istreambuf_iterator<char>(std::cin), {}};
    auto made = common_json::array();
    for (const auto & job : common_json::parse(input)) made.push_back(rendered(job));
    std::cout << made.dump();
}
"""
# Several models in one process. `pre`: what it shall call a pre-tokenizer whose vocabulary it cannot know.
_DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
jobs = json.loads(sys.argv[2])
import convert_hf_to_gguf as converter
from conversion.base import TextModel
recognised = TextModel.get_vocab_base_pre
for model, file, pre in jobs:
    TextModel.get_vocab_base_pre = (lambda *_, pre=pre: pre) if pre else recognised
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", file, "--outtype", "f32"]
    converter.main()
"""


def source(cache_dir: Path) -> Path:
    """llama.cpp's converter and its Jinja, from the source of the installed llama-cpp-python; 77 MB, once.

    Skips where it is not to be had.
    """
    version = importlib.metadata.version("llama-cpp-python")
    kept = cache_dir / f"llama_cpp_source_{version}_2"  # of what is kept of it, the second choice
    if not kept.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            archive = _source(version, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(archive, unpacked)
            unpacked.rename(kept)
    return kept


def jinja(source_dir: Path) -> Path:
    """A program that renders templates with llama.cpp's Jinja; half a minute to compile, once.

    Skips where no C++ compiler is.
    """
    made = source_dir / f"renderer_{hashlib.sha256(_RENDERER.encode()).hexdigest()[:12]}"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not made.is_file():
        if compiler is None:
            pytest.skip("no C++ compiler (c++, g++, clang++) is here, and llama.cpp's Jinja must be compiled")
        with tempfile.TemporaryDirectory(dir=source_dir) as scratch:
            program, written = Path(scratch) / "renderer", Path(scratch) / "renderer.cpp"
            written.write_text(_RENDERER, encoding="utf-8")
            common = source_dir / "common"
            files = [*common.glob("jinja/*.cpp"), common / "json.cpp", common / "unicode.cpp", written]
            places = [f"-I{source_dir / place}" for place in ("common", "vendor", "ggml/include")]
            command = [compiler, "-std=c++17", "-O0", *places, *map(str, files), "-o", str(program)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            program.rename(made)
    return made


def options(source_dir: Path) -> set[str]:
    """What its programs take on their command lines."""
    return set(re.findall(r'"(--?[a-z][a-z0-9-]*)"', (source_dir / "common" / "arg.cpp").read_text(encoding="utf-8")))


def rendered(program: Path, jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Of each {"template": …, "variables": …} the text, or {"error": …}."""
    done = subprocess.run([str(program)], input=json.dumps(jobs), capture_output=True, text=True, check=True)
    made: list[Any] = json.loads(done.stdout)
    return made


def _source(version: str, directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    command = [*pip, "--dest", str(directory), f"llama-cpp-python=={version}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or error).strip().splitlines()[-1]
        pytest.skip(
            f"the source of llama-cpp-python {version}, which has llama.cpp's converter, is not to be had: {said}"
        )
    return next(directory.glob("*.tar.gz"))


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        for item in tar:
            _, is_there, name = item.name.partition("/vendor/llama.cpp/")
            if is_there and item.isfile() and name.startswith((*_CONVERTER, *_JINJA, *_SERVER)):
                stream = tar.extractfile(item)
                assert stream is not None
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(stream.read())


def convert(converter_dir: Path, jobs: Sequence[tuple[Path, Path, str | None]]) -> None:
    """(directory, GGUF in float32, name of the pre-tokenizer or None) of each model."""
    listed = json.dumps([(str(model), str(file), pre) for model, file, pre in jobs])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(converter_dir), listed], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def quantise(source: Path, quant_type: str, made: Path) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = gguf.LlamaFileType[f"MOSTLY_{quant_type}"], 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(params)) == 0
    return made


@dataclass(frozen=True)
class Tensor:
    ggml_type: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class File:
    """What a GGUF holds, in its order. gguf's own reader takes half a minute for 128,000 tokens."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, file: Path) -> Self:
        content = file.read_bytes()
        read = _Reader(content)
        magic, version, tensors, keys = read.numbers("<4sIQQ")
        assert (magic, version) == (b"GGUF", 3)
        metadata = {}
        for _ in range(keys):
            key = read.text()
            metadata[key] = read.value(read.numbers("<I")[0])
        table = []
        for _ in range(tensors):
            name = read.text()
            shape = read.numbers(f"<{read.numbers('<I')[0]}Q")
            table.append((name, shape, *read.numbers("<IQ")))
        start = -(-read.place // 32) * 32
        return cls(metadata, {name: cls._tensor(content, start + at, shape, n) for name, shape, n, at in table})

    @staticmethod
    def _tensor(content: bytes, start: int, shape: tuple[int, ...], number: int) -> Tensor:
        ggml_type = gguf.GGMLQuantizationType(number)
        numbers, size = gguf.GGML_QUANT_SIZES[ggml_type]
        return Tensor(ggml_type.name, shape, content[start : start + prod(shape) // numbers * size])


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.content, self.place)
        self.place += struct.calcsize(form)
        return found

    def text(self) -> str:
        (length,) = self.numbers("<Q")
        self.place += length
        return self.content[self.place - length : self.place].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.text()
        if kind == gguf.GGUFValueType.ARRAY:
            kind, count = self.numbers("<IQ")
            return [self.value(kind) for _ in range(count)]
        return self.numbers("<" + "BbHhIif?__QqdX"[kind].replace("_", ""))[0]
