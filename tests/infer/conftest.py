"""The fixture of the tests of answers: the tiny Saiga, loaded."""

from contextlib import closing

import pytest

from saigakit import infer


@pytest.fixture(scope="module")
def llm(gguf_file):
    with closing(infer.load(gguf_file, n_ctx=256, n_threads=1)) as loaded:
        yield loaded
