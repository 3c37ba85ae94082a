"""Choosing the kernels that llama.cpp loads a model with."""

import llama_cpp
import pytest

from saigakit.llamacpp import forward


@pytest.mark.parametrize(("built", "repacks"), [(b"AVX2 = 1 | AMX_INT8 = 1 |", False), (b"AVX2 = 1 |", True)])
def test_amx_is_turned_off_only_where_llama_cpp_was_built_with_it(monkeypatch, built, repacks):
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: built)
    params = llama_cpp.llama_model_default_params()
    assert params.use_extra_bufts
    forward.disable_amx(params)
    assert params.use_extra_bufts == repacks
