"""Fixtures of the tests of answers: the tiny Saiga as a GGUF."""

from contextlib import closing

import pytest

from saigakit import export, infer


@pytest.fixture(scope="module")
def gguf_file(tiny, tmp_path_factory):
    """The tiny Saiga in float32: its numbers do not depend on how many sequences share a batch."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return export.to_gguf(model="saiga_tiny", adapter="released", output=file, quant_type="F32")


@pytest.fixture(scope="module")
def llm(gguf_file):
    with closing(infer.load(gguf_file, n_ctx=256, n_threads=1)) as loaded:
        yield loaded
