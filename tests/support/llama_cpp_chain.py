"""Run llama.cpp's converter, quantiser and Jinja, and read GGUF files byte by byte."""

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
_VOCABULARIES = ("models/ggml-vocab-llama-bpe.gguf", "models/ggml-vocab-qwen2.gguf")  # with texts and their ids
_JINJA = ("common/jinja/", "common/json.", "common/unicode.", "vendor/nlohmann/", "ggml/include/ggml.h")
# Prints the text of each template with its variables, or {"error": …}.
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
# Several models in one process. `pre`: the name of a pre-tokenizer whose vocabulary it does not know.
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


def download_source(cache_dir: Path) -> Path:
    """The converter and the Jinja sources of the installed llama-cpp-python, downloaded once (77 MB).

    Skips the test if they are not available.
    """
    version = importlib.metadata.version("llama-cpp-python")
    kept = cache_dir / f"llama_cpp_source_{version}_3"  # changed when more files are kept
    if not kept.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            archive = _download(version, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(archive, unpacked)
            unpacked.rename(kept)
    return kept


def compile_jinja(source_dir: Path) -> Path:
    """A program that renders templates with llama.cpp's Jinja, compiled once (half a minute).

    Skips the test without a C++ compiler.
    """
    made = source_dir / f"renderer_{hashlib.sha256(_RENDERER.encode()).hexdigest()[:12]}"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not made.is_file():
        if compiler is None:
            pytest.skip("no C++ compiler (c++, g++, clang++) was found to compile llama.cpp's Jinja")
        with tempfile.TemporaryDirectory(dir=source_dir) as scratch:
            program, written = Path(scratch) / "renderer", Path(scratch) / "renderer.cpp"
            written.write_text(_RENDERER, encoding="utf-8")
            common = source_dir / "common"
            files = [*common.glob("jinja/*.cpp"), common / "json.cpp", common / "unicode.cpp", written]
            includes = [f"-I{source_dir / directory}" for directory in ("common", "vendor", "ggml/include")]
            command = [compiler, "-std=c++17", "-O0", *includes, *map(str, files), "-o", str(program)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            program.rename(made)
    return made


def server_options(source_dir: Path) -> set[str]:
    """The command-line options of llama.cpp's programs."""
    return set(re.findall(r'"(--?[a-z][a-z0-9-]*)"', (source_dir / "common" / "arg.cpp").read_text(encoding="utf-8")))


def render(program: Path, jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The text for each {"template": …, "variables": …}, or {"error": …}."""
    done = subprocess.run([str(program)], input=json.dumps(jobs), capture_output=True, text=True, check=True)
    made: list[Any] = json.loads(done.stdout)
    return made


def _download(version: str, directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    command = [*pip, "--dest", str(directory), f"llama-cpp-python=={version}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = str(error.stderr or error).strip().splitlines()[-1]
        pytest.skip(f"the source of llama-cpp-python {version}, with llama.cpp's converter, is not available: {reason}")
    return next(directory.glob("*.tar.gz"))


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        for item in tar:
            _, is_there, name = item.name.partition("/vendor/llama.cpp/")
            if is_there and item.isfile() and name.startswith((*_CONVERTER, *_JINJA, *_SERVER, *_VOCABULARIES)):
                stream = tar.extractfile(item)
                assert stream is not None
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(stream.read())


def convert(converter_dir: Path, jobs: Sequence[tuple[Path, Path, str | None]]) -> None:
    """`jobs`: (directory, GGUF in float32 to write, name of the pre-tokenizer or None) for each model."""
    listed = json.dumps([(str(model), str(file), pre) for model, file, pre in jobs])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(converter_dir), listed], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def quantise(source: Path, quant_type: str, made: Path, *, threads: int = 2) -> Path:
    """Run llama.cpp's quantiser. For rows of no multiple of 32, that of 0.3.35 must be asked for today's F16."""
    if _quantise(source, quant_type, made, threads) == 0:
        return made
    assert importlib.metadata.version("llama-cpp-python") == "0.3.35"
    assert all(tensor.shape[0] % 32 for tensor in File.of(source).tensors.values())
    assert _quantise(source, "F16", made, threads) == 0
    gguf.GGUFReader(made, "r+").fields["general.file_type"].parts[-1][0] = gguf.LlamaFileType[f"MOSTLY_{quant_type}"]
    return made


def _quantise(source: Path, quant_type: str, made: Path, threads: int) -> int:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = gguf.LlamaFileType[f"MOSTLY_{quant_type}"], threads
    status: int = llama_cpp.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(params))
    return status


@dataclass(frozen=True)
class Tensor:
    ggml_type: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class File:
    """The content of a GGUF in its order. gguf's own reader takes half a minute for 128,000 tokens."""

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
        start = -(-read.offset // 32) * 32
        return cls(metadata, {name: cls._tensor(content, start + at, shape, n) for name, shape, n, at in table})

    @staticmethod
    def _tensor(content: bytes, start: int, shape: tuple[int, ...], number: int) -> Tensor:
        ggml_type = gguf.GGMLQuantizationType(number)
        numbers, size = gguf.GGML_QUANT_SIZES[ggml_type]
        return Tensor(ggml_type.name, shape, content[start : start + prod(shape) // numbers * size])


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.offset = content, 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.content, self.offset)
        self.offset += struct.calcsize(form)
        return found

    def text(self) -> str:
        (length,) = self.numbers("<Q")
        self.offset += length
        return self.content[self.offset - length : self.offset].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.text()
        if kind == gguf.GGUFValueType.ARRAY:
            kind, count = self.numbers("<IQ")
            return [self.value(kind) for _ in range(count)]
        return self.numbers("<" + "BbHhIif?__QqdX"[kind].replace("_", ""))[0]
