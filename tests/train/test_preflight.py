"""Checks before weights load."""

import shutil
from types import SimpleNamespace

import pytest
from small_models import adapter, base

from saigakit.config import TrainConfig
from saigakit.core import workspace
from saigakit.core.workspace import Gpu
from saigakit.errors import SaigaError
from saigakit.registry import ATTENTION, Lora
from saigakit.train import preflight
from saigakit.weights import load, memory
from saigakit.weights.model_shape import ModelShape

T4 = Gpu("Tesla T4", (7, 5), 16 * 10**9, 15 * 10**9)
P100 = Gpu("Tesla P100", (6, 0), 16 * 10**9, 15 * 10**9)


def config(**settings):
    return TrainConfig(**({"model": "saiga_tiny", "train_file": "x", "output_dir": "y"} | settings))


@pytest.mark.parametrize(("gpus", "expected"), [([], "float32"), ([T4, T4], "float16")])
def test_returns_the_number_format_of_the_machine(gpus, expected):
    assert preflight.check_machine(config(), gpus) == expected


def test_refuses_an_old_gpu():
    with pytest.raises(SaigaError, match=r"sm_60.*T4 x2"):
        preflight.check_machine(config(), [P100])


def test_accepts_an_old_gpu_that_is_not_used():
    assert preflight.check_machine(config(processes=1), [T4, P100]) == "float16"


@pytest.mark.parametrize(
    ("gpus", "words"), [([T4], "1 GPU is available.*processes=1"), ([T4, T4], "2 GPUs are available.*=2")]
)
def test_refuses_more_processes_than_gpus(gpus, words):
    with pytest.raises(SaigaError, match=rf"processes=3, but only {words}"):
        preflight.check_machine(config(processes=3), gpus)


def test_accepts_several_processes_on_a_cpu():
    assert preflight.check_machine(config(processes=3), []) == "float32"


@pytest.mark.parametrize(("version", "refused"), [("0.10.0", True), ("0.15.1", True), ("0.16.0", False)])
def test_refuses_an_old_torchao_and_names_the_command_to_remove_it(tmp_path, monkeypatch, version, refused):
    information = tmp_path / f"torchao-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchao\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if not refused:
        assert preflight.check_machine(config(), []) == "float32"
        return
    with pytest.raises(SaigaError, match=rf"torchao {version} .*pip uninstall torchao"):
        preflight.check_machine(config(), [])


def test_refuses_one_process_that_sees_two_gpus():
    with pytest.raises(SaigaError, match=r"sees 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        preflight.check_visible_gpus(visible_gpus=2, processes=1, number_format="float16")
    preflight.check_visible_gpus(visible_gpus=2, processes=2, number_format="float16")
    preflight.check_visible_gpus(visible_gpus=0, processes=1, number_format="float32")


def test_refuses_a_torch_that_sees_no_gpu_although_nvidia_smi_does():
    with pytest.raises(SaigaError, match="torch sees no GPU"):
        preflight.check_visible_gpus(visible_gpus=0, processes=1, number_format="bfloat16")


def test_continued_adapter_keeps_its_own_settings(tiny):
    lora = preflight.check_model(config(adapter="released"), tiny / "base", tiny / "adapter")
    assert (lora.rank, lora.alpha, set(lora.target_modules)) == (4, 8, set(ATTENTION))
    new = Lora(rank=3)
    assert preflight.check_model(config(adapter=None, lora=new), tiny / "base", None) == new


def test_refuses_lora_settings_with_a_continued_adapter(tiny):
    with pytest.raises(SaigaError, match=r"lora has no effect.*keeps its own settings \(rank 4, alpha 8.*adapter=None"):
        preflight.check_model(config(adapter="released", lora=Lora(rank=32)), tiny / "base", tiny / "adapter")
    same = load.lora_of(tiny / "adapter")
    assert preflight.check_model(config(adapter="released", lora=same), tiny / "base", tiny / "adapter") == same


def test_refuses_the_adapter_of_another_base(tiny, tmp_path):
    other = base(tmp_path / "base", tiny / "base", hidden_size=32)
    with pytest.raises(SaigaError, match="is the adapter of another base"):
        preflight.check_model(config(), tiny / "base", adapter(tmp_path / "adapter", other))


@pytest.mark.parametrize("target", ["c_attn", "lm_head", "input_layernorm"])
def test_refuses_unknown_target_modules_and_lists_the_known_ones(tiny, target):
    lora = Lora(target_modules=("q_proj", target))
    with pytest.raises(SaigaError, match=rf"has no linear layers {target}; it has down_proj, gate_proj, .*q_proj"):
        preflight.check_model(config(adapter=None, lora=lora), tiny / "base", None)


def test_modules_to_save_allows_only_embeddings_and_head(tiny):
    whole = Lora(modules_to_save=("embed_tokens", "lm_head"))
    assert preflight.check_model(config(adapter=None, lora=whole), tiny / "base", None) == whole
    with pytest.raises(SaigaError, match="modules_to_save cannot include norm, only 'embed_tokens' and 'lm_head'"):
        preflight.check_model(config(adapter=None, lora=Lora(modules_to_save=("norm",))), tiny / "base", None)


def test_modules_to_save_refuses_tied_embeddings(tiny, tmp_path):
    tied = base(tmp_path / "base", tiny / "base", tie_word_embeddings=True)
    with pytest.raises(SaigaError, match=r"modules_to_save=.*tied"):
        preflight.check_model(config(adapter=None, lora=Lora(modules_to_save=("lm_head",))), tied, None)


def test_refuses_a_vision_language_base(tiny, monkeypatch):
    stored = {"language_model.model.layers.0.self_attn.q_proj.weight": None}
    monkeypatch.setattr(preflight.tensors, "open_base", lambda _: SimpleNamespace(stored=stored))
    with pytest.raises(SaigaError, match=r"vision-language model.*the text model alone"):
        preflight.check_model(config(), tiny / "base", None)


def test_refuses_a_base_with_a_missing_shard(tiny, tmp_path):
    sharded = base(tmp_path / "base", tiny / "base", shards="200KB")
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(SaigaError, match=lost.name):
        preflight.check_model(config(adapter=None), sharded, None)


def test_names_a_damaged_adapter_config(tiny, tmp_path):
    shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SaigaError, match=r"adapter_config\.json is missing or damaged"):
        preflight.check_model(config(), tiny / "base", tmp_path / "adapter")


def test_refuses_a_disk_without_room_for_checkpoints(tiny, tmp_path, monkeypatch):
    shape = ModelShape.from_config(tiny / "base")
    lora = Lora(rank=64)
    adapter_bytes = 4 * shape.adapter_parameters(lora)
    monkeypatch.setattr(workspace, "free_disk", lambda _: 12 * adapter_bytes + 10 * 10**6)
    preflight.check_disk(tmp_path, shape, lora)
    monkeypatch.setattr(workspace, "free_disk", lambda _: 12 * adapter_bytes + 10 * 10**6 - 1)
    with pytest.raises(SaigaError, match=r"its checkpoints needs 0\.02 GB of disk .* and 0\.02 GB are free"):
        preflight.check_disk(tmp_path, shape, lora)


PARTS = {"weights": 12 * 10**9, "activations": 4 * 10**9}


def test_refuses_a_gpu_with_too_little_memory_and_reports_the_numbers(capsys):
    with pytest.raises(
        SaigaError, match=r"about 16\.0 GB of memory on Tesla T4, and 15\.0 GB of 16\.0 GB.*max_seq_length"
    ):
        preflight.check_memory(PARTS, [T4], 1, pack="it")
    assert "per process for it: 16.0 GB (weights 12.0 GB, activations 4.0 GB)" in capsys.readouterr().out
    preflight.check_memory({"weights": 14 * 10**9}, [T4], 1, pack="it")


def test_processes_on_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(workspace, "available_memory", lambda: 20 * 10**9)
    preflight.check_memory(PARTS, [], 1, pack="it")
    with pytest.raises(SaigaError, match=r"32\.0 GB of memory, and 20\.0 GB are free"):
        preflight.check_memory(PARTS, [], 2, pack="it")


def test_refuses_an_adapter_that_cannot_be_folded(tiny, tmp_path):
    adapter(tmp_path / "adapter", tiny / "base", use_dora=True)
    with pytest.raises(SaigaError, match=r"DoRA.*use adapter='released'"):
        preflight.check_model(config(), tiny / "base", tmp_path / "adapter")


def test_every_process_loads_a_sharded_base(monkeypatch):
    shape = ModelShape(hidden=8, layers=2, heads=2, kv_heads=2, head_dim=4, intermediate=16, vocabulary=100, tied=False)
    whole = memory.weight_bytes(shape, "nf4", 2)
    monkeypatch.setattr(workspace, "available_memory", lambda: 2 * whole - 1)
    sharded = config(sharding="fsdp", quantization="nf4")
    preflight.check_sharded_loading(sharded, shape, 1)
    with pytest.raises(SaigaError, match="Loading the base in each of 2 processes"):
        preflight.check_sharded_loading(sharded, shape, 2)
