"""Configs that make transformers or peft run code, fetch it or load another model are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_models
import torch

from saigakit import registry
from saigakit.core import workspace
from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.weights import find, load, tensors
from saigakit.weights.generate import Request, answers

MARK = "Path(os.environ['RAN']).write_text('ran')"
KERNELS = f"""
import os
from pathlib import Path
class Anything:
    def __init__(self, *a, **k): pass
    def __call__(self, *a, **k): return a[0] if a and callable(a[0]) else self
def get_kernel(*a, **k):
    {MARK}
    raise ValueError("enough")
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return (lambda *a, **k: lambda made: made) if name[0] == "u" else Anything
"""
LOAD = """
import sys; from pathlib import Path
import torch
from saigakit.errors import SaigaError; from saigakit.weights import load
try:
    load.base_model(Path(sys.argv[1]), "none", torch.float32, "cpu")
except SaigaError as error:
    print(error)
"""


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """The file that foreign code leaves behind."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    return tmp_path / "ran"


@pytest.fixture
def base(base_dir, tmp_path) -> Path:
    return Path(shutil.copytree(base_dir, tmp_path / "given"))


@pytest.fixture
def adapter(adapter_dir, tmp_path) -> Path:
    return Path(shutil.copytree(adapter_dir, tmp_path / "given_adapter"))


def write_module(root: Path, name: str, code: str) -> Path:
    package = root / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code, encoding="utf-8")
    return root


@pytest.mark.slow
def test_no_kernel_that_a_config_names_is_fetched(base, ran, tmp_path):
    site = write_module(tmp_path / "site", "kernels", KERNELS)
    (site / "kernels-0.18.2.dist-info").mkdir()
    (site / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    small_models.edit_json(base / "config.json", _attn_implementation="someone/kernel")
    path = f"{site}:{Path(__file__).parents[2]}"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(base)],
        env={"PATH": "", "PYTHONPATH": path, "RAN": str(ran), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert not ran.exists(), done
    assert "_attn_implementation='someone/kernel'" in done.stdout, done


def test_no_module_that_an_adapter_names_is_imported(adapter, base_dir, ran, tmp_path, monkeypatch):
    write_module(tmp_path / "site" / "megatron", "core", f"import os\nfrom pathlib import Path\n{MARK}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    small_models.edit_json(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="megatron.core")
    model = load.base_model(base_dir, "none", torch.float32, "cpu")
    places = {"base_dir": str(base_dir), "adapter_dir": str(adapter)}
    asked = Request(
        prompts=[[1]], stop_ids=[2], max_new_tokens=1, quantization="none", number_format="float32", **places
    )
    for use in (lambda: load.with_adapter(model, adapter, Lora()), lambda: answers(asked)):
        with pytest.raises(SaigaError, match="uses megatron_config, which"):
            use()
        assert not ran.exists()


def test_refuses_a_base_with_an_adapter_that_transformers_would_attach(base, adapter_dir):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter_dir / name, base / name)
    small_models.edit_json(base / "adapter_config.json", base_model_name_or_path=str(base))
    for use in (
        lambda: load.base_model(base, "none", torch.float32, "cpu"),
        lambda: find.base_dir(registry.find(str(base))),
    ):
        with pytest.raises(SaigaError, match=r"given contains adapter_config\.json next to a base model"):
            use()


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "paged|someone/kernel@v1:function"},
        {"_attn_implementation_internal": "flash_attention_2"},  # fetches a kernel if flash_attn is not installed
        {"_attn_implementation": {"text_config": "someone/kernel"}},
        {"_experts_implementation": "deepgemm"},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
        {"text_config": {"vision": [{"auto_map": {"AutoConfig": "a.B"}}]}},
        {"transformers_weights": "other.safetensors"},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"load_in_4bit": True}},
        {"kernel_of_the_future": "someone/kernel"},
        {"backbones": ["timm/resnet50"]},
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_refuses_a_config_that_names_code_or_other_weights(base, name, settings):
    (base / name).write_text('{"model_type": "llama"}', encoding="utf-8")
    small_models.edit_json(base / name, **settings)
    with pytest.raises(SaigaError, match=rf"{name}: .* can make transformers fetch or run code, or load other weights"):
        find.base_dir(registry.find(str(base)))


def test_a_config_that_is_nested_too_deeply_is_damage(base):
    (base / "config.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(SaigaError, match=r"config\.json is missing or damaged \(maximum recursion depth"):
        find.base_dir(registry.find(str(base)))


def test_refuses_code_in_the_config_of_a_tokenizer(base):
    small_models.edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]})
    with pytest.raises(SaigaError, match=r"tokenizer_config\.json: auto_map="):
        find.base_dir(registry.find(str(base)))


@pytest.mark.parametrize(
    "settings",
    [
        {"_name_or_path": "IlyaGusev/saiga_llama3_8b", "unsloth_version": "2025.3.19"},
        {"model_name": "unsloth/Qwen3-4B", "text_config": {"_name_or_path": "google/gemma-3-12b"}},
        {"_attn_implementation": "sdpa", "_attn_implementation_autoset": True, "_experts_implementation": None},
        {"cache_implementation": "hybrid", "torch_dtype": "bfloat16", "hidden_act": "silu", "auto_map": {}},
        {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "float16"}},
        {"license": "cc-by/4.0", "created": "2024/05", "datasets": ["IlyaGusev/saiga_scored"]},
        {"_attn_implementation": {"text_config": "sdpa", "vision_config": "eager"}},
        {"eos_token": "</s>", "license": "https://example.org/licence", "rope_scaling": {"rope_type": "yarn"}},
    ],
)
def test_accepts_what_published_configs_contain(base, settings):
    small_models.edit_json(base / "config.json", **settings)
    assert find.base_dir(registry.find(str(base))) == base


def test_accepts_names_and_tokens_in_the_config_of_a_tokenizer(base):
    tokens = {"3": {"content": "and/or"}}
    small_models.edit_json(base / "tokenizer_config.json", name_or_path="a/b", added_tokens_decoder=tokens)
    assert find.base_dir(registry.find(str(base))) == base


@pytest.mark.parametrize("name", ["../other.safetensors", "sub/other.safetensors", "ABSOLUTE"])
def test_refuses_an_index_that_names_a_file_elsewhere(base, name):
    (base / "sub").mkdir()
    name = name.replace("ABSOLUTE", str(base / "sub" / "other.safetensors"))
    shutil.copy(base / "model.safetensors", base / name)
    index = {"weight_map": {"model.norm.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(
        SaigaError, match=r"index\.json is missing or damaged \('.*' in weight_map is not a file next to"
    ):
        tensors.open_base(base)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": ["a"]}, {"weight_map": {"a": 5}}, {"weight_map": {"a": ".."}}]
)
def test_an_index_of_another_form_is_damaged(base, index):
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(SaigaError, match="is missing or damaged"):
        tensors.open_base(base)


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"a": 1}},
        {"megatron_core": "json"},
        {"layer_replication": [[0, 2]]},
        {"setting_of_the_future": "someone/kernel"},
    ],
)
def test_no_setting_that_is_not_known_reaches_peft(adapter, base_dir, settings):
    small_models.edit_json(adapter / "adapter_config.json", **settings)
    with pytest.raises(SaigaError, match=f"uses {next(iter(settings))}, which saigakit cannot merge"):
        load.lora_of(adapter)


def test_children_fetch_no_kernels():
    assert workspace.child_environment()["USE_HUB_KERNELS"] == "NO"
