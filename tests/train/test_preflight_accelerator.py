"""A GPU that does not work, and Kaggle without one, are refused before anything is downloaded."""

import json

import pytest
from small_trainings import config_for

from saigakit import registry, train
from saigakit.core import install
from saigakit.core.workspace import Gpu
from saigakit.errors import SaigaError
from saigakit.weights import find, load

T4 = Gpu("Tesla T4", (7, 5), 16 * 10**9, 15 * 10**9)


@pytest.fixture
def on_kaggle(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")


@pytest.fixture
def no_download(monkeypatch):
    for name in ("base_dir", "adapter_dir", "tokenizer_dir"):
        monkeypatch.setattr(find, name, lambda *_: pytest.fail("a model was looked for"))


@pytest.mark.parametrize("processes", [None, 1])
def test_a_gpu_that_torch_cannot_use_is_refused(records, tmp_path, stub_gpus, no_download, processes):
    stub_gpus("Tesla T4", "Tesla T4")
    names = "Tesla T4, Tesla T4" if processes is None else "Tesla T4"
    with pytest.raises(SaigaError, match=f"nvidia-smi lists {names}, but torch cannot compute there.*T4 x2") as caught:
        train.train_adapter(config_for(records, tmp_path, processes=processes))
    [said] = str(caught.value).splitlines()[1:]
    assert said.startswith(("Torch not compiled with CUDA enabled", "Found no NVIDIA driver"))  # CPU and CUDA builds


def test_a_base_of_7b_on_kaggle_without_a_gpu_is_refused(records, tmp_path, stub_gpus, on_kaggle, no_download):
    stub_gpus()
    config = config_for(records, tmp_path, model="saiga2_7b")
    with pytest.raises(SaigaError, match=r"saiga2_7b has 6\.7 billion .* no GPU\. .*choose the accelerator GPU T4 x2"):
        train.train_adapter(config)


def test_a_small_base_on_kaggles_cpu_and_a_large_one_at_home_are_accepted(no_download, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    load.require_accelerator(registry.find("saiga2_7b"), None, [])
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    load.require_accelerator(registry.find("smollm2_135m"), None, [])


def test_the_size_of_a_directory_is_that_of_its_config(tmp_path, tiny, on_kaggle):
    load.require_accelerator(registry.find(str(tiny / "base")), None, [])
    large = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(large), encoding="utf-8")
    for model, base_source in ((str(tmp_path), None), ("owner/name", str(tmp_path))):
        with pytest.raises(SaigaError, match=r"has 1\.7 billion parameters, and this session has no GPU"):
            load.require_accelerator(registry.find(model), base_source, [])


def test_every_gpu_that_will_be_used_is_tried(tmp_path, monkeypatch):
    """With a stand-in for torch: its second GPU is dead, and CUDA's errors have several lines."""
    failing = 'if device == "cuda:1": raise RuntimeError("CUDA error: device lost\\nCompile with TORCH_USE_CUDA_DSA")'
    code = f"class ones:\n    def __init__(self, size, device):\n        {failing!s}\n    def item(self): return 1\n"
    (tmp_path / "torch.py").write_text(code.replace("lost\n", "lost\\n"), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    install.require_cuda([T4])
    with pytest.raises(SaigaError, match=r"Tesla T4, Tesla T4, but .*torch said:\nCUDA error: device lost\n"):
        install.require_cuda([T4, T4])
