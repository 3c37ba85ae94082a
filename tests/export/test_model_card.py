"""The model card, Modelfile and server command written from the GGUF itself."""

import re
from contextlib import closing

import llama_cpp
import pytest
import small_models

from saigakit import export, registry
from saigakit.core import install, manifest
from saigakit.core.workspace import GIB
from saigakit.errors import SaigaError
from saigakit.export import fit, model_card, modelfile
from saigakit.llamacpp import forward


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    return export.to_gguf(model="saiga_tiny", adapter="released", output=directory / "model.gguf")


@pytest.fixture(scope="module")
def texts(file, tiny):
    inputs = {"adapter": manifest.hashes(tiny / "adapter")}
    return model_card.companion_texts(
        {"Q4_K_M": file}, spec=registry.find("saiga_tiny"), inputs=inputs, measured="| a |"
    )


def test_the_three_files_name_the_gguf_and_the_same_context(texts, file):
    assert list(texts) == ["Modelfile", "llama-server.txt", "README.md"]
    assert f"FROM ./{file.name}\n" in texts["Modelfile"]
    assert "PARAMETER num_ctx 1024" in texts["Modelfile"]
    assert f"-m {file.name} -c 1024 --jinja" in texts["llama-server.txt"]
    assert texts["llama-server.txt"].strip() in texts["README.md"]


def test_the_modelfile_of_the_tiny_saiga_has_every_instruction_and_no_template(texts, file):
    lines = [line for line in texts["Modelfile"].splitlines() if not line.startswith("#")]
    assert lines == [
        f"FROM ./{file.name}",
        "REQUIRES 0.30.11",
        f'SYSTEM """{registry.SAIGA_SYSTEM_PROMPT}"""',
        'PARAMETER stop "</s>"',
        "PARAMETER temperature 0.2",
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 30",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_ctx 1024",
    ]


def test_the_gguf_has_a_chat_template_with_tools_which_ollama_keeps(file):
    """For a template without tools it may choose a Go template of its own."""
    with closing(llama_cpp.Llama(str(file), vocab_only=True, verbose=False)) as llm:
        assert "tools" in llm.metadata["tokenizer.chat_template"]


def test_the_card_names_the_ollama_version_that_the_modelfile_requires(texts):
    assert f"Ollama {modelfile.OLLAMA_VERSION} or later" in texts["README.md"]


def test_the_card_lists_what_the_file_was_made_of_without_paths_of_this_machine(texts, file, tiny):
    card = texts["README.md"]
    assert re.search(r"adapter, SHA-256 \| `[0-9a-f]{64}`", card)
    assert "with a LoRA adapter merged in" in card
    assert "## Measured\n\n| a |" in card
    assert f"{file.stat().st_size / 1e9:.3f} GB" in card
    assert str(file.parent) not in card and str(tiny) not in card


def python_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_the_python_snippet_in_the_card_compiles(texts):
    code = python_of(texts["README.md"])
    compile(code, "card", "exec")
    assert registry.SAIGA_SYSTEM_PROMPT in code


def test_the_card_explains_how_to_build_llama_cpp_where_it_would_crash(texts):
    assert f'CMAKE_ARGS="{install.WITHOUT_AMX}" pip install' in texts["README.md"]


def test_all_files_name_the_same_context_and_cache_type_where_memory_is_short(tiny, tmp_path, monkeypatch):
    base_dir = small_models.base(tmp_path / "base", tiny / "base", head_dim=32)
    file = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "model.gguf")
    with closing(llama_cpp.Llama(str(file), vocab_only=True, verbose=False)) as llm:
        needs = fit.Needs.of(forward.read_shape(llm), file.stat().st_size, 512, "q8_0")
    monkeypatch.setattr(fit, "SYSTEM", 6 * GIB - needs.resident)  # nothing else fits the smallest machine
    made = model_card.companion_texts({"Q4_K_M": file}, spec=registry.find(str(base_dir)), inputs={})
    assert "-c 512 " in made["llama-server.txt"]
    assert "--cache-type-k q8_0 --cache-type-v q8_0 --cache-ram 0" in made["llama-server.txt"]
    assert "OLLAMA_KV_CACHE_TYPE=q8_0" in made["Modelfile"] and "OLLAMA_KV_CACHE_TYPE=q8_0" in made["README.md"]
    assert "PARAMETER num_ctx 512" in made["Modelfile"]
    monkeypatch.chdir(file.parent)
    run = {}
    exec(python_of(made["README.md"]).replace("messages, ", "messages, max_tokens=4, "), run)
    assert run["llm"].n_ctx() == 512
    assert run["llm"].context_params.type_k == run["llm"].context_params.type_v == llama_cpp.GGML_TYPE_Q8_0
    run["llm"].close()


def test_nothing_is_overwritten(file, tmp_path):
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SaigaError, match=r"README\.md already exists; nothing was overwritten"):
        model_card.write_companions({"Q4_K_M": copy}, spec=registry.find("saiga_tiny"), inputs={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "model.gguf"]
    made = model_card.write_companions({"Q4_K_M": copy}, spec=registry.find("saiga_tiny"), inputs={}, prefix="mine.")
    assert [path.name for path in made] == ["mine.Modelfile", "mine.llama-server.txt", "mine.README.md"]
