"""The exported file against llama.cpp's quantiser byte for byte, and against the logits of transformers."""

import hashlib
import json
import shutil
from contextlib import closing
from functools import cache

import gguf
import llama_cpp
import llama_cpp_chain
import numpy as np
import pytest
import small_models
import torch
from matrix import matrix
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from saigakit import export, infer, registry
from saigakit.core import manifest, workspace
from saigakit.errors import SaigaError
from saigakit.export import fit, other_formats
from saigakit.export.merge_plan import MergePlan
from saigakit.llamacpp import quantization
from saigakit.registry import Sampling
from saigakit.weights import lineage
from saigakit.weights.merge import Merged

QUANT_TYPES = [quant_type for quant_type in quantization.QUANT_TYPES if quant_type != "F32"]
# Rows that are not a multiple of 256, tied embeddings, four queries per key.
TIED = {
    "hidden_size": 288,
    "intermediate_size": 256,
    "num_hidden_layers": 9,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
# Enough layers for eighths, sixteenths and every third layer.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 17,
    "num_attention_heads": 8,
    "rope_parameters": small_models.LLAMA3_ROPE,
}
ODD = {"hidden_size": 48, "intermediate_size": 80}  # not a multiple of 32 either
DEEP = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 80,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
NEMO = {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # wider heads than hidden
LLAMA3 = {"head_dim": 64, "num_key_value_heads": 1, "rope_parameters": small_models.LLAMA3_ROPE}
# A window shorter than the longest prompt, layers with full attention, and two RoPE bases.
GEMMA = {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 24}
GEMMA |= {"tie_word_embeddings": True}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
PROMPTS = ([1, 404, 505, 606, 7, 8, 9, 300], [1, 5], list(range(10, 90)), [1, 260, 261, 700, 2, 13, 1, 300, 301])


def make(directory, tiny, **settings):
    """(base, adapter) directories."""
    base_dir = small_models.base(directory / "base", tiny / "base", **settings)
    return base_dir, small_models.adapter(directory / "adapter", base_dir)


@pytest.fixture(scope="module")
def tied(tiny, tmp_path_factory):
    return make(tmp_path_factory.mktemp("tied"), tiny, **TIED)


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    return make(tmp_path_factory.mktemp("wide"), tiny, **WIDE)


@pytest.fixture(scope="module")
def odd(tiny, tmp_path_factory):
    return make(tmp_path_factory.mktemp("odd"), tiny, **ODD)


@pytest.fixture(scope="module")
def deep(tiny, tmp_path_factory):
    return small_models.base(tmp_path_factory.mktemp("deep"), tiny / "base", **DEEP), None


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    """Exports the merged model in float32, once for each model and adapter."""

    @cache
    def make(model, adapter):
        file = tmp_path_factory.mktemp("float") / "float.gguf"
        return export.to_gguf(model=str(model), adapter=adapter, output=file, quant_type="F32")

    return make


def require_llama_cpps_bytes(float_file, model, adapter, quant_type, directory):
    made = export.to_gguf(model=str(model), adapter=adapter, output=directory / "made.gguf", quant_type=quant_type)
    floats = float_file(model, adapter)
    reference = llama_cpp_chain.quantise(floats, quant_type, directory / "reference.gguf", threads=1)
    ours, theirs = ({tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors} for file in (made, reference))
    assert {name: tensor.tensor_type.name for name, tensor in ours.items()} == {
        name: tensor.tensor_type.name for name, tensor in theirs.items()
    }
    assert [name for name in ours if ours[name].data.tobytes() != theirs[name].data.tobytes()] == []
    assert made.read_bytes() == reference.read_bytes()


@pytest.mark.parametrize("quant_type", matrix(QUANT_TYPES, ["Q4_0", "Q4_K_M", "Q8_0", "F16"]))
@pytest.mark.parametrize("name", ["tied", "wide", "odd"])
def test_the_file_equals_the_one_that_llama_cpp_quantises(request, float_file, name, quant_type, tmp_path):
    require_llama_cpps_bytes(float_file, *request.getfixturevalue(name), quant_type, tmp_path)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_tiny_saigas_file_equals_the_one_that_llama_cpp_quantises(float_file, quant_type, tmp_path):
    require_llama_cpps_bytes(float_file, "saiga_tiny", "released", quant_type, tmp_path)


def test_a_model_of_80_layers_is_quantised_as_llama_cpp_does(float_file, deep, tmp_path):
    require_llama_cpps_bytes(float_file, *deep, "Q3_K_M", tmp_path)


class LookedUpGelu(torch.nn.Module):
    """As llama.cpp computes it: from a table of float16 between -10 and 10."""

    def forward(self, x):
        found = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))


def beyond_the_table(base_dir):
    """Make the gates so large that values from the table do not matter."""
    file = base_dir / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: tensor * 1000 for name, tensor in tensors.items() if "gate_proj" in name}
    save_file(tensors, file, metadata={"format": "pt"})


def logits_of_both(model, base_dir, adapter_dir, tmp_path, activation=None):
    """(llama.cpp's, transformers') for each prompt, with llama.cpp's KV cache in float32."""
    file = export.to_gguf(model=model, adapter=adapter_dir, output=tmp_path / "float.gguf", quant_type="F32")
    # eager: sdpa of transformers 5.0 leaves out the softcapping of Gemma-2
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, attn_implementation="eager")
    merged = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload()
    for layer in merged.model.layers if activation else ():
        layer.mlp.act_fn = activation
    options = {"n_ctx": 128, "logits_all": True, "type_k": 0, "type_v": 0, "n_threads": 1, "verbose": False}
    found = []
    with closing(llama_cpp.Llama(str(file), **options)) as llm, torch.no_grad():
        for prompt in PROMPTS:
            llm.reset()
            llm.eval(prompt)
            found.append((llm.scores[: len(prompt)].copy(), merged(torch.tensor([prompt])).logits[0].numpy()))
    return found


def require_transformers_logits(model, base_dir, adapter_dir, tmp_path):
    for got, expected in logits_of_both(model, base_dir, adapter_dir, tmp_path):
        assert np.array_equal(got.argmax(-1), expected.argmax(-1))
        np.testing.assert_allclose(got, expected, atol=5e-4 * expected.std())


@pytest.mark.parametrize(
    "settings",
    [
        *(LLAMA3, TIED, NEMO, {"num_key_value_heads": 4}, {"qwen3": True, "head_dim": 32}, {"attention_bias": True}),
        *(
            {"kind": "qwen2"},
            {"kind": "gemma2", **GEMMA},
            {"kind": "gemma3_text", **GEMMA, "rope_parameters": GEMMA3_ROPE},
        ),
    ],
    ids=["llama 3 rope", "tied", "head_dim", "no groups", "qwen3", "biases", "qwen2", "gemma 2", "gemma 3"],
)
def test_llama_cpp_computes_what_transformers_computes(tiny, tmp_path, settings):
    base_dir, adapter_dir = make(tmp_path, tiny, **settings)
    if settings.get("kind", "").startswith("gemma"):
        beyond_the_table(base_dir)
    require_transformers_logits(str(base_dir), base_dir, adapter_dir, tmp_path)


@pytest.mark.parametrize("kind", [{"kind": "gemma2"}, {"kind": "gemma3_text", "rope_parameters": GEMMA3_ROPE}])
def test_gemmas_gelu_differs_from_transformers_only_by_llama_cpps_table(tiny, tmp_path, kind):
    # A value near the boundary of two float16 numbers may be rounded to either, which affects later positions.
    base_dir, adapter_dir = make(tmp_path, tiny, **kind, **GEMMA)
    pairs = logits_of_both(str(base_dir), base_dir, adapter_dir, tmp_path, LookedUpGelu())
    errors = np.concatenate([np.abs(got - wanted).max(-1) / wanted.std() for got, wanted in pairs])
    assert errors.min() < 5e-5
    assert errors.max() < 0.1


def test_llama_cpp_computes_what_the_tiny_saiga_with_its_released_adapter_computes(tiny, tmp_path):
    require_transformers_logits("saiga_tiny", tiny / "base", tiny / "adapter", tmp_path)


def test_the_quantised_file_answers(tiny, tmp_path):
    file = export.to_gguf(model="saiga_tiny", adapter="released", output=tmp_path / "x.gguf")
    with closing(infer.load(file, n_ctx=256)) as llm:
        greedily = Sampling(temperature=0.0)
        pieces = infer.stream(llm, [{"role": "user", "content": "Привет"}], sampling=greedily, max_new_tokens=8)
        assert "".join(pieces)


def test_the_file_recommends_the_sampling_of_the_registry(tiny, tmp_path):
    file = export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path / "x.gguf")
    with closing(infer.load(file, n_ctx=64)) as llm:
        assert Sampling.from_gguf(llm.metadata) == Sampling(**registry.find("saiga_tiny").sampling)
        assert llm.metadata["general.license"] == "apache-2.0"
        assert llm.metadata["general.file_type"] == "15"


@pytest.fixture
def trained(tiny, tmp_path):
    """A run_dir with a finished 02_train."""
    parameters = {"model": "saiga_tiny"}
    with manifest.making(tmp_path / "02_train", stage="02_train", parameters=parameters, inputs={}) as directory:
        small_models.adapter(directory, tiny / "base")
    return tmp_path


def test_the_stage_has_the_file_its_companions_and_the_facts(trained):
    made = export.merge_gguf(model="saiga_tiny", run_dir=trained)
    assert sorted(file.name for file in made.iterdir()) == [
        *("Modelfile", "README.md", "llama-server.txt", "memory.png", "model.gguf", "saigakit.json", "sizes.png")
    ]
    found = manifest.require_stage(made, "03_merge_gguf", model="saiga_tiny")
    assert found["parameters"]["quant_type"] == "Q4_K_M"
    assert found["bytes"] == (made / "model.gguf").stat().st_size
    assert found["inputs"]["adapter"]["adapter_model.safetensors"]
    template_hash = found["chat_template_sha256"]
    with closing(infer.load(made / "model.gguf", n_ctx=64)) as llm:
        text = llm.metadata["tokenizer.chat_template"]
    assert hashlib.sha256(text.encode()).hexdigest() == template_hash


def test_a_finished_stage_is_reused(trained, capsys):
    made = export.merge_gguf(model="saiga_tiny", run_dir=trained)
    before = (made / "model.gguf").stat().st_mtime_ns
    assert export.merge_gguf(model="saiga_tiny", run_dir=trained) == made
    assert (made / "model.gguf").stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().out


def test_replacing_a_stage_prints_an_estimate_too(trained, monkeypatch, capsys):
    export.merge_gguf(model="saiga_tiny", run_dir=trained)
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    capsys.readouterr()
    export.merge_gguf(model="saiga_tiny", run_dir=trained, quant_type="Q8_0")
    assert "write Q8_0" in capsys.readouterr().out


def test_the_memory_table_includes_an_unusual_type_that_was_made(trained):
    made = export.merge_gguf(model="saiga_tiny", run_dir=trained, quant_type="F16")
    found = [row[0] for row in fit.memory_table(made).rows]
    assert found[:2] == ["F16", "Q8_0"] and "BF16" not in found


def test_a_stage_with_another_quant_type_is_not_overwritten(trained):
    export.merge_gguf(model="saiga_tiny", run_dir=trained)
    with pytest.raises(SaigaError, match=r"quant_type: 'Q4_K_M' there, 'Q8_0' now"):
        export.merge_gguf(model="saiga_tiny", run_dir=trained, quant_type="Q8_0")


def test_an_adapter_trained_for_another_model_is_refused(trained):
    file = trained / "02_train" / manifest.NAME
    small_models.edit_json(file, parameters={"model": "saiga2_7b"})
    with pytest.raises(SaigaError, match=r"made for model='saiga2_7b'.*'saiga_tiny'"):
        export.merge_gguf(model="saiga_tiny", run_dir=trained)


def test_weights_that_the_adapter_was_not_trained_on_are_refused(trained):
    file = trained / "02_train" / manifest.NAME
    small_models.edit_json(file, inputs={"base": {"config.json": "a", "model.safetensors": "another"}})
    with pytest.raises(SaigaError, match="trained on other weights"):
        export.merge_gguf(model="saiga_tiny", run_dir=trained)
    assert not (trained / "03_merge_gguf").exists()


def to_safetensors(*, model, adapter, output):
    return other_formats.to_safetensors(MergePlan.of(model, adapter), output)


@pytest.mark.parametrize("into", [export.to_gguf, other_formats.to_lora_gguf, to_safetensors])
@pytest.mark.parametrize(
    ("changed", "named"),
    [({"inputs": {"base": {"x.safetensors": "another"}}}, "other weights"), ({"parameters": {"model": "x"}}, "'x'")],
)
def test_every_format_checks_what_the_adapter_was_trained_on(trained, into, changed, named):
    small_models.edit_json(trained / "02_train" / manifest.NAME, **changed)
    with pytest.raises(SaigaError, match=named):
        into(model="saiga_tiny", adapter=trained / "02_train", output=trained / "made")
    assert [item.name for item in trained.iterdir()] == ["02_train"]


def test_merging_into_the_dequantised_base_needs_an_adapter(tiny, tmp_path):
    with pytest.raises(SaigaError, match="merge_into='dequantized' needs an adapter"):
        export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path / "x.gguf", merge_into="dequantized")


@pytest.mark.parametrize(
    ("prompt", "written"),
    [("Ты — словарь.", "Ты — словарь."), ("", None), (None, registry.MODELS["saiga_tiny"].system_prompt)],
    ids=["one", "none", "several"],
)
def test_the_system_prompt_of_the_training_records_is_in_the_file(trained, prompt, written):
    small_models.edit_json(trained / "02_train" / manifest.NAME, system_prompt=prompt)
    made = export.merge_gguf(model="saiga_tiny", run_dir=trained)
    with closing(infer.load(made / "model.gguf", n_ctx=64)) as llm:
        assert llm.metadata.get(lineage.SYSTEM_PROMPT_KEY) == written
    assert ("SYSTEM" in (made / "Modelfile").read_text(encoding="utf-8")) == (written is not None)


def test_other_files_next_to_the_weights_do_not_change_the_base(trained, tiny, tmp_path):
    base = manifest.hashes(tiny / "base")
    small_models.edit_json(trained / "02_train" / manifest.NAME, inputs={"base": base})
    clone = shutil.copytree(tiny / "base", tmp_path / "clone")
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.safetensors"):
        (clone / name).write_bytes(b"not read")
    assert export.merge_gguf(model="saiga_tiny", run_dir=trained, base_source=str(clone)).is_dir()


def test_a_manifest_that_cannot_be_written_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    options = {"model": "saiga_tiny", "adapter": None, "output": tmp_path / "x.gguf", "with_manifest": True}
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write", full)
        with pytest.raises(SaigaError, match=r"x\.gguf could not be written: .*No space left"):
            export.to_gguf(**options)
    assert list(tmp_path.iterdir()) == []
    export.to_gguf(**options)
    assert {file.name for file in tmp_path.iterdir()} == {"x.gguf", "x.saigakit.json"}


def test_a_disk_that_is_too_small_is_reported_before_the_first_byte(trained, monkeypatch):
    monkeypatch.setattr(workspace, "free_disk", lambda path: 10_000)
    with pytest.raises(SaigaError, match=r"needs 0\.00 GB of disk.*choose another place"):
        export.merge_gguf(model="saiga_tiny", run_dir=trained)
    assert [item.name for item in trained.iterdir()] == ["02_train"]


def test_the_disk_is_checked_for_the_exact_size_of_the_file(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(workspace, "require_disk", lambda path, needed, what: asked.append(needed))
    file = export.to_gguf(model="saiga_tiny", adapter="released", output=tmp_path / "x.gguf")
    assert asked == [file.stat().st_size + 10**6]  # the files next to it


def test_too_little_memory_is_reported(trained, monkeypatch):
    monkeypatch.setattr(workspace, "available_memory", lambda: 1000)
    with pytest.raises(SaigaError, match="The export needs about"):
        export.merge_gguf(model="saiga_tiny", run_dir=trained)


def test_a_failure_while_writing_leaves_nothing_and_a_rerun_works(trained, monkeypatch):
    read = Merged.read

    def failing(self, name, rows=None):
        if "layers.1" in name:
            raise OSError(28, "No space left on device")
        return read(self, name, rows)

    with monkeypatch.context() as broken:
        broken.setattr(Merged, "read", failing)
        with pytest.raises(SaigaError, match="No space left on device"):
            export.merge_gguf(model="saiga_tiny", run_dir=trained)
        assert not (trained / "03_merge_gguf").exists()
    assert (export.merge_gguf(model="saiga_tiny", run_dir=trained) / "model.gguf").is_file()


def test_an_interrupt_leaves_nothing(tiny, tmp_path, monkeypatch):
    def interrupted(self, name, rows=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Merged, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(SaigaError, match="already exists"):
        export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_the_adapter_of_another_base_is_refused_before_anything_is_written(tied, tmp_path):
    with pytest.raises(SaigaError, match=r"another base"):
        export.to_gguf(model="saiga_tiny", adapter=tied[1], output=tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_may_be_given_as_a_path_or_as_text(tiny, tmp_path):
    files = [
        export.to_gguf(model="saiga_tiny", adapter=adapter, output=tmp_path / f"{i}.gguf")
        for i, adapter in enumerate((tiny / "adapter", str(tiny / "adapter"), "released"))
    ]
    assert len({file.read_bytes() for file in files}) == 1


def test_the_metadata_have_the_values_of_the_config(wide, tmp_path):
    file = export.to_gguf(model=str(wide[0]), adapter=None, output=tmp_path / "x.gguf")
    config = json.loads((wide[0] / "config.json").read_text(encoding="utf-8"))
    with closing(infer.load(file, n_ctx=64)) as llm:
        written = llm.metadata
    for key, name in (
        ("llama.block_count", "num_hidden_layers"),
        ("llama.context_length", "max_position_embeddings"),
        ("llama.embedding_length", "hidden_size"),
        ("llama.feed_forward_length", "intermediate_size"),
        ("llama.attention.head_count", "num_attention_heads"),
        ("llama.attention.head_count_kv", "num_key_value_heads"),
        ("llama.attention.key_length", "head_dim"),
        ("llama.rope.dimension_count", "head_dim"),
        ("llama.vocab_size", "vocab_size"),
    ):
        assert written[key] == str(config[name]), key
    assert float(written["llama.rope.freq_base"]) == config["rope_parameters"]["rope_theta"]
