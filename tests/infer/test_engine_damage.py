"""Damage in a GGUF on which llama.cpp aborts its process: a child reads every file first."""

import json
import random
import re
import subprocess
import sys
import urllib.request
from contextlib import closing

import gguf
import numpy as np
import pytest

from saigakit import export, infer
from saigakit.errors import SaigaError

UINT32, FLOAT32, STRING, ARRAY = (gguf.GGUFValueType[name] for name in ("UINT32", "FLOAT32", "STRING", "ARRAY"))
QUERY = "blk.0.attn_q.weight"
# By what aborted: loading, making a context, reading the vocabulary, or computing.
DAMAGE = {
    "no layers": ({"llama.block_count": (0, UINT32)}, {}),
    "too many layers": ({"llama.block_count": (1000, UINT32)}, {}),
    "experts that are not used": ({"llama.expert_count": (8, UINT32)}, {}),
    "too many experts": ({"llama.expert_count": (10**5, UINT32)}, {}),
    "an unknown scaling": ({"llama.rope.scaling.type": ("unknown", STRING)}, {}),
    "equal tokens": ({"tokenizer.ggml.tokens": (["a"] * 768, ARRAY, STRING)}, {}),
    "another vocabulary": ({"tokenizer.ggml.model": ("bert", STRING)}, {}),
    "embeddings of integers": ({}, {"token_embd.weight": np.ones((768, 64), np.int32)}),
    "no vocabulary": ({"tokenizer.ggml.model": ("none", STRING)}, {}),
    "a negative epsilon": ({"llama.attention.layer_norm_rms_epsilon": (-1.0, FLOAT32)}, {}),
    "norms of float16": ({}, {"output_norm.weight": np.ones(64, np.float16)}),
    "a matrix of integers": ({}, {QUERY: np.ones((64, 64), np.int8)}),
    "a matrix of float64": ({}, {QUERY: np.ones((64, 64), np.float64)}),
}


@pytest.fixture(scope="module")
def gguf_file(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return export.to_gguf(model="saiga_tiny", adapter="released", output=file, quant_type="Q8_0")


def rewritten(source, target, values, tensors):
    """A copy of a GGUF with other values and tensors."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *values):
            writer.add_key_value(key, field.contents(), *field.types[:2])
    for key, value in values.items():
        writer.add_key_value(key, *value)
    for tensor in reader.tensors:
        changed = tensors.get(tensor.name)
        kind = tensor.tensor_type if changed is None else None
        writer.add_tensor(tensor.name, tensor.data if changed is None else changed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(("values", "tensors"), DAMAGE.values(), ids=DAMAGE)
def test_damage_that_aborts_llama_cpp_is_one_sentence(gguf_file, tmp_path, values, tensors):
    damaged = rewritten(gguf_file, tmp_path / "damaged.gguf", values, tensors)
    said = r"damaged\.gguf is damaged: it crashes llama\.cpp\. Download .*\n.*signal"
    with pytest.raises(SaigaError, match=said) as refused:
        infer.load(damaged, n_ctx=64)
    assert len(str(refused.value).splitlines()) < 12  # no backtrace of a debugger


def test_a_copy_without_damage_is_loaded_and_tried_once(gguf_file, tmp_path, capfd):
    copy = rewritten(gguf_file, tmp_path / "copy.gguf", {}, {})
    infer.engine._require_harmless.cache_clear()
    for _ in range(2):
        with closing(infer.load(copy, n_ctx=64)) as llm:
            assert llm.eval([1]) is None
    assert infer.engine._require_harmless.cache_info().misses == 1
    assert capfd.readouterr().out == ""


def test_a_template_that_would_fill_the_memory_is_refused_before_it_is_compiled(gguf_file, tmp_path):
    values = {"tokenizer.chat_template": ("{{ 'a' * 200000000 }}", STRING)}
    file = rewritten(gguf_file, tmp_path / "bomb.gguf", values, {})
    with pytest.raises(SaigaError, match=r"^The chat template in .*bomb\.gguf is broken: .*nine digits"):
        infer.load(file, n_ctx=64)


COMMAND = [sys.executable, "-c", "import os; os.cpu_count = lambda: 1; from saigakit.cli import main; main()"]


def mutated(source, target, seed):
    """A copy with one to four other bytes, half of the time in the metadata."""
    content, numbers = bytearray(source.read_bytes()), random.Random(seed)
    for _ in range(numbers.randint(1, 4)):
        content[numbers.randrange(20_000 if seed % 2 else len(content))] = numbers.randrange(256)
    target.write_bytes(content)
    return target


def require_a_sentence(code, errors):
    """Neither a signal nor a traceback."""
    assert code in (0, 1), f"{code}: {errors[-2000:]}"
    assert "Traceback" not in errors


def run(*arguments, question=""):
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, input=question, capture_output=True, text=True, errors="replace", timeout=300)
    require_a_sentence(done.returncode, done.stderr)
    return done


@pytest.fixture(scope="module")
def schema_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("schema") / "schema.json"
    file.write_text(json.dumps({"type": "array", "items": {"type": "string", "x-quote": True}, "maxItems": 2}))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_chat_with_a_mutated_file_is_an_answer_or_a_sentence(gguf_file, tmp_path, seed):
    run("chat", mutated(gguf_file, tmp_path / "x.gguf", seed), "--n-ctx", 256, question="Привет")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 40))
def test_extract_with_a_mutated_file_is_an_answer_or_a_sentence(gguf_file, tmp_path, schema_file, seed):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"Азот — газ."\n', encoding="utf-8")
    file = mutated(gguf_file, tmp_path / "x.gguf", seed)
    options = ("--schema", schema_file, "--input", texts, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 32)
    run("extract", file, *options, "--n-ctx", 256)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 60))
def test_serve_with_a_mutated_file_is_an_answer_or_a_sentence(gguf_file, tmp_path, seed):
    file = mutated(gguf_file, tmp_path / "x.gguf", seed)
    command = [*COMMAND, "serve", str(file), "--port", "0", "--n-ctx", "256", "--parallel", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        if address := re.search(r"http\S+", process.stdout.readline()):
            body = {"messages": [{"role": "user", "content": "Привет"}], "max_tokens": 8}
            try:
                with urllib.request.urlopen(f"{address[0]}/chat/completions", json.dumps(body).encode(), 60) as answer:
                    assert json.load(answer)["choices"]
            except urllib.error.HTTPError as error:
                assert json.load(error)["error"]["message"]
            process.terminate()
        errors = process.communicate(timeout=60)[1]
        require_a_sentence(process.returncode, errors)


def test_extract_answers_strange_texts_or_says_why_not(gguf_file, tmp_path, schema_file):
    texts, output = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    strange = ["я" * 2**19, "\0" * 10_000, "</s><s>" * 10_000, "половина \ud83d", "нуль \0 здесь", "</s>" * 20, " "]
    texts.write_text("".join(json.dumps(text) + "\n" for text in strange), encoding="utf-8")
    options = ("--schema", schema_file, "--input", texts, "--output", output, "--max-new-tokens", 64)
    run("extract", gguf_file, *options, "--n-ctx", 256)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(len(strange)))
    assert all(line.get("error") or "value" in line for line in lines)
