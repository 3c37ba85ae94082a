"""Fixtures of the tests of answers: the tiny Saiga, loaded, or next to its manifest."""

import json
from contextlib import closing

import pytest

from saigakit import infer
from saigakit.core.files import sha256_of_text
from saigakit.prompt.backends import gguf_vocabulary, vocabulary_sha256


@pytest.fixture(scope="module")
def llm(gguf_file):
    with closing(infer.load(gguf_file, n_ctx=256, n_threads=1)) as loaded:
        yield loaded


@pytest.fixture
def exported(gguf_file, tmp_path):
    """Copy the file and write the manifest of its stage, with some other facts."""

    def write(**facts):
        file = tmp_path / "model.gguf"
        file.write_bytes(gguf_file.read_bytes())
        with gguf_vocabulary(file) as llm:
            template, vocabulary = llm.metadata["tokenizer.chat_template"], vocabulary_sha256(llm)
        about = {"files": {file.name: {"bytes": file.stat().st_size}}, "vocabulary_sha256": vocabulary}
        about |= {"stage": "03_merge_gguf", "chat_template_sha256": sha256_of_text(template)}
        content = {"parameters": {}, "inputs": {}, "outputs": {}, **about, **facts}
        (tmp_path / "saigakit.json").write_text(json.dumps(content), encoding="utf-8")
        return file

    return write
