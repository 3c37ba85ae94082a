"""What cannot work is refused before weights load, with the number and the parameter to change."""

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
def test_a_machine_that_can_train_gives_the_number_format(gpus, expected):
    assert preflight.machine(config(), gpus) == expected


def test_an_old_gpu_is_refused():
    with pytest.raises(SaigaError, match=r"sm_60.*T4 x2"):
        preflight.machine(config(), [P100])


def test_a_second_old_gpu_that_is_not_used_is_no_reason():
    assert preflight.machine(config(processes=1), [T4, P100]) == "float16"


@pytest.mark.parametrize(("gpus", "words"), [([T4], "1 GPU is here.*processes=1"), ([T4, T4], "2 GPUs are.*=2")])
def test_more_processes_than_gpus_are_refused(gpus, words):
    with pytest.raises(SaigaError, match=rf"processes=3, and {words}"):
        preflight.machine(config(processes=3), gpus)


def test_several_processes_on_a_cpu_are_no_mistake():
    assert preflight.machine(config(processes=3), []) == "float32"


@pytest.mark.parametrize(("version", "refused"), [("0.10.0", True), ("0.15.1", True), ("0.16.0", False)])
def test_a_torchao_that_peft_refuses_is_named_with_the_command_that_mends_it(tmp_path, monkeypatch, version, refused):
    information = tmp_path / f"torchao-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchao\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if not refused:
        assert preflight.machine(config(), []) == "float32"
        return
    with pytest.raises(SaigaError, match=rf"torchao {version} .*pip uninstall torchao"):
        preflight.machine(config(), [])


def test_one_process_that_sees_two_gpus_is_refused():
    with pytest.raises(SaigaError, match=r"sees 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        preflight.process(visible_gpus=2, processes=1, number_format="float16")
    preflight.process(visible_gpus=2, processes=2, number_format="float16")
    preflight.process(visible_gpus=0, processes=1, number_format="float32")


def test_a_torch_that_sees_no_gpu_is_refused_where_nvidia_smi_lists_one():
    with pytest.raises(SaigaError, match="torch sees no GPU"):
        preflight.process(visible_gpus=0, processes=1, number_format="bfloat16")


def test_the_adapter_that_is_continued_is_described_by_its_own_files(tiny):
    lora = preflight.model(config(adapter="released"), tiny / "base", tiny / "adapter")
    assert (lora.rank, lora.alpha, set(lora.target_modules)) == (4, 8, set(ATTENTION))
    new = Lora(rank=3)
    assert preflight.model(config(adapter=None, lora=new), tiny / "base", None) == new


def test_settings_of_a_new_lora_beside_a_continued_adapter_are_refused(tiny):
    with pytest.raises(SaigaError, match=r"lora is given.*keeps its own \(rank 4, alpha 8.*adapter=None"):
        preflight.model(config(adapter="released", lora=Lora(rank=32)), tiny / "base", tiny / "adapter")
    same = load.lora_of(tiny / "adapter")
    assert preflight.model(config(adapter="released", lora=same), tiny / "base", tiny / "adapter") == same


def test_the_adapter_of_another_base_is_refused(tiny, tmp_path):
    other = base(tmp_path / "base", tiny / "base", hidden_size=32)
    with pytest.raises(SaigaError, match="belongs to another base model"):
        preflight.model(config(), tiny / "base", adapter(tmp_path / "adapter", other))


@pytest.mark.parametrize("target", ["c_attn", "lm_head", "input_layernorm"])
def test_target_modules_that_the_layers_lack_are_named_beside_those_they_have(tiny, target):
    lora = Lora(target_modules=("q_proj", target))
    with pytest.raises(SaigaError, match=rf"names {target}, and the layers of .* have down_proj, gate_proj, .*q_proj"):
        preflight.model(config(adapter=None, lora=lora), tiny / "base", None)


def test_only_embeddings_and_head_can_be_trained_as_a_whole(tiny):
    whole = Lora(modules_to_save=("embed_tokens", "lm_head"))
    assert preflight.model(config(adapter=None, lora=whole), tiny / "base", None) == whole
    with pytest.raises(SaigaError, match="modules_to_save names norm; use 'embed_tokens' or 'lm_head'"):
        preflight.model(config(adapter=None, lora=Lora(modules_to_save=("norm",))), tiny / "base", None)


def test_tied_embeddings_cannot_be_trained_as_a_whole(tiny, tmp_path):
    tied = base(tmp_path / "base", tiny / "base", tie_word_embeddings=True)
    with pytest.raises(SaigaError, match=r"modules_to_save=.*tied"):
        preflight.model(config(adapter=None, lora=Lora(modules_to_save=("lm_head",))), tied, None)


def test_a_base_that_reads_images_is_refused(tiny, monkeypatch):
    stored = {"language_model.model.layers.0.self_attn.q_proj.weight": None}
    monkeypatch.setattr(preflight.tensors, "open_base", lambda _: SimpleNamespace(stored=stored))
    with pytest.raises(SaigaError, match=r"reads images too.*its text model alone"):
        preflight.model(config(), tiny / "base", None)


def test_a_base_without_one_of_its_shards_is_refused(tiny, tmp_path):
    sharded = base(tmp_path / "base", tiny / "base", shards="200KB")
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(SaigaError, match=lost.name):
        preflight.model(config(adapter=None), sharded, None)


def test_a_damaged_config_of_the_adapter_is_named(tiny, tmp_path):
    shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SaigaError, match=r"adapter_config\.json is missing or damaged"):
        preflight.model(config(), tiny / "base", tmp_path / "adapter")


def test_a_disk_without_room_for_checkpoints_is_told_with_both_numbers(tiny, tmp_path, monkeypatch):
    shape = ModelShape.from_config(tiny / "base")
    lora = Lora(rank=64)
    adapter_bytes = 4 * shape.adapter_parameters(lora)
    monkeypatch.setattr(workspace, "free_disk", lambda _: 12 * adapter_bytes + 10 * 10**6)
    preflight.disk(tmp_path, shape, lora)
    monkeypatch.setattr(workspace, "free_disk", lambda _: 12 * adapter_bytes + 10 * 10**6 - 1)
    with pytest.raises(SaigaError, match=r"its checkpoints needs 0\.02 GB of disk .* and 0\.02 GB are free"):
        preflight.disk(tmp_path, shape, lora)


PARTS = {"weights": 12 * 10**9, "activations": 4 * 10**9}


def test_a_gpu_that_is_too_small_is_told_with_all_numbers(capsys):
    with pytest.raises(SaigaError, match=r"about 16\.0 GB on Tesla T4 .*15\.0 GB of its 16\.0 GB.*max_seq_length"):
        preflight.fits(PARTS, [T4], 1, pack="it")
    assert "16.0 GB for each process (weights 12.0 GB, activations 4.0 GB)" in capsys.readouterr().out
    preflight.fits({"weights": 14 * 10**9}, [T4], 1, pack="it")


def test_processes_on_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(workspace, "available_memory", lambda: 20 * 10**9)
    preflight.fits(PARTS, [], 1, pack="it")
    with pytest.raises(SaigaError, match=r"32\.0 GB of memory, and 20\.0 GB are free"):
        preflight.fits(PARTS, [], 2, pack="it")


def test_an_adapter_that_cannot_be_folded_is_refused_before_weights_load(tiny, tmp_path):
    adapter(tmp_path / "adapter", tiny / "base", use_dora=True)
    with pytest.raises(SaigaError, match=r"DoRA.*use adapter='released'"):
        preflight.model(config(), tiny / "base", tmp_path / "adapter")


def test_a_sharded_base_is_loaded_by_every_process(monkeypatch):
    shape = ModelShape(hidden=8, layers=2, heads=2, kv_heads=2, head_dim=4, intermediate=16, vocabulary=100, tied=False)
    whole = memory.weight_bytes(shape, "nf4", 2)
    monkeypatch.setattr(workspace, "available_memory", lambda: 2 * whole - 1)
    sharded = config(sharding="fsdp", quantization="nf4")
    preflight.sharded_loading(sharded, shape, 1)
    with pytest.raises(SaigaError, match="Loading the base in each of 2 processes"):
        preflight.sharded_loading(sharded, shape, 2)
