"""The default max_seq_length is the longest pack that a T4 can train on in nf4, by the estimate of memory."""

from dataclasses import replace

import pytest

from saigakit.registry import MODELS
from saigakit.weights.memory import Pack, TrainingStep
from saigakit.weights.model_shape import ModelShape

# nvidia-smi says 15,360 MiB, torch gets this: openproblems-bio/task_batch_integration#111, Zheng-Chong/CatVTON#133.
T4 = 14.56 * 2**30
ERROR = 1.05  # tests/weights/test_memory.py allows the estimate to be 5 % low
STEP = 256

LLAMA2_7B = ModelShape(
    hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocabulary=32000, tied=False
)
LLAMA3_8B = replace(LLAMA2_7B, kv_heads=8, intermediate=14336, vocabulary=128256)
NEMO_12B = replace(LLAMA3_8B, hidden=5120, layers=40, vocabulary=131072)
QWEN3_8B = replace(LLAMA3_8B, layers=36, intermediate=12288, vocabulary=151936, head_norms=True)
QWEN3_4B = replace(QWEN3_8B, hidden=2560, intermediate=9728, tied=True)
YANDEXGPT_8B = replace(LLAMA3_8B, vocabulary=129024)  # config.json of IlyaGusev/saiga_yandexgpt_8b
SHAPES = {
    "saiga2_7b": LLAMA2_7B,
    "saiga2_13b": replace(LLAMA2_7B, hidden=5120, layers=40, heads=40, kv_heads=40, intermediate=13824),
    "saiga_mistral_7b": replace(LLAMA3_8B, vocabulary=32002),
    "saiga_llama3_8b": LLAMA3_8B,
    "saiga_nemo_12b": NEMO_12B,
    "saiga_yandexgpt_8b": YANDEXGPT_8B,
    "tlite_2.1_8b": QWEN3_8B,  # its base, not its own config.json
    "vikhr_nemo_12b": NEMO_12B,  # its base
    "avibe": replace(QWEN3_8B, vocabulary=116_300),  # its base; the vocabulary follows from the sizes of its files
    "qvikhr3_4b": QWEN3_4B,  # its base
    "ruadapt_qwen3_4b": QWEN3_4B,  # its base, whose vocabulary it replaces by one of about the same size
    "qwen3_4b_2507": QWEN3_4B,  # config.json of Qwen/Qwen3-4B-Instruct-2507
    "yandexgpt5_lite_8b_instruct": YANDEXGPT_8B,
}
TRAINED_ON_A_T4 = [spec for spec in MODELS.values() if spec.float16_safe and not spec.base_model.startswith("package:")]


def needed(spec, tokens):
    step = TrainingStep(
        shape=SHAPES[spec.name],
        lora=spec.lora,
        pack=Pack.one_document(tokens),
        quantization=spec.quantization,
        itemsize=2,
        checkpointing=True,
    )
    return ERROR * sum(step.memory().values())


@pytest.mark.parametrize("spec", TRAINED_ON_A_T4, ids=lambda spec: spec.name)
def test_a_t4_holds_max_seq_length_and_not_much_more(spec):
    assert spec.quantization == "nf4"
    assert spec.max_seq_length % STEP == 0
    assert needed(spec, spec.max_seq_length) <= T4
    longer = spec.max_seq_length + STEP
    assert longer > spec.context_length or needed(spec, longer) > T4


@pytest.mark.parametrize("spec", TRAINED_ON_A_T4, ids=lambda spec: spec.name)
def test_the_shape_has_the_parameters_of_the_registry(spec):
    shape = SHAPES[spec.name]
    assert (shape.linear_parameters + shape.embedding_parameters) / 1e9 == pytest.approx(spec.parameters_b, rel=0.01)
