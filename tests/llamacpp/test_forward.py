"""Choosing the kernels that llama.cpp loads a model with."""

import gguf
import llama_cpp
import pytest

from saigakit.errors import SaigaError
from saigakit.llamacpp import forward


@pytest.mark.parametrize(("built", "repacks"), [(b"AVX2 = 1 | AMX_INT8 = 1 |", False), (b"AVX2 = 1 |", True)])
def test_amx_is_turned_off_only_where_llama_cpp_was_built_with_it(monkeypatch, built, repacks):
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: built)
    params = llama_cpp.llama_model_default_params()
    assert params.use_extra_bufts
    forward.disable_amx(params)
    assert params.use_extra_bufts == repacks


def test_the_reason_of_llama_cpp_is_in_the_error(tmp_path):
    file = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(file, "lemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for _ in range(2):
        with (
            pytest.raises(SaigaError, match=r"cannot load .*x\.gguf: unknown model architecture: 'lemma'\.$"),
            forward.load_weights(file),
        ):
            pass
