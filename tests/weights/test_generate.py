import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from saigakit.weights.generate import Request, answer, answers, cut_at_stop, greedy, plan_batches

PROMPTS = [[5, 9, 17], [8, 3, 40, 41, 42, 43, 44], [99], [12, 13, 14, 15, 16, 12, 13]]
STOP = frozenset({7})


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # so that the likeliest token depends on the prompt
    )
    model = LlamaForCausalLM(config)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.update(do_sample=True, temperature=2.0)
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter_dir(base_dir, tmp_path_factory):
    torch.manual_seed(1)
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(base_dir),
        LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    directory = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(directory)
    return directory


def asking(base_dir, prompts=PROMPTS, *, adapter_dir=None, max_new_tokens=12):
    return Request(
        prompts=prompts,
        stop_ids=sorted(STOP),
        max_new_tokens=max_new_tokens,
        base_dir=str(base_dir),
        adapter_dir=None if adapter_dir is None else str(adapter_dir),
        quantization="none",
        number_format="float32",
    )


def ask(base_dir, prompts=PROMPTS, **settings):
    return answers(asking(base_dir, prompts, **settings))["before"]


def greedy_by_hand(base_dir, prompt, count):
    model, ids = LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32), list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in STOP:
            break
    return ids[len(prompt) :]


def test_a_batch_answers_like_one_prompt_at_a_time(base_dir):
    assert ask(base_dir).ids == [ask(base_dir, [prompt]).ids[0] for prompt in PROMPTS]


def test_answers_are_greedy_whatever_the_models_own_defaults_are(base_dir):
    assert ask(base_dir).ids == [greedy_by_hand(base_dir, prompt, 12) for prompt in PROMPTS]


def test_the_adapter_is_used_only_on_request(base_dir, adapter_dir):
    made = answers(asking(base_dir, adapter_dir=adapter_dir))
    assert made["after"].ids != made["before"].ids == ask(base_dir).ids


def test_no_answer_is_longer_than_the_limit(base_dir):
    made = ask(base_dir, max_new_tokens=3)
    assert max(map(len, made.ids)) <= 3
    assert made.tokens_per_s * made.seconds == pytest.approx(sum(map(len, made.ids)))


def test_progress_counts_up_to_all_texts(base_dir):
    seen = []
    model = LlamaForCausalLM.from_pretrained(base_dir)
    answer(model, asking(base_dir, max_new_tokens=4), lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, 4), (4, 4))


class LargestTensor(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_the_head_is_not_copied_for_every_row_of_a_batch(base_dir, adapter_dir):
    # torch.nn.functional.linear expands a frozen weight if its input is a slice, as the hidden states of a prompt are.
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_dir), adapter_dir).eval().get_base_model()
    model.generation_config = GenerationConfig()
    with LargestTensor() as largest:
        greedy(model, PROMPTS * 4, STOP, 2)
    head = model.get_output_embeddings()
    assert largest.numbers <= 16 * 7 * 128 < 16 * head.weight.numel()  # at most all logits
    assert not head._forward_pre_hooks


def test_every_prompt_is_in_one_batch_and_no_batch_exceeds_the_budget():
    lengths = [10, 300, 20, 150, 151, 40] * 30
    batches = plan_batches(lengths, max_new_tokens=50, budget=2000)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) * (max(lengths[i] for i in batch) + 50) <= 2000 for batch in batches)


def test_a_prompt_over_the_budget_is_a_batch_of_its_own():
    assert plan_batches([5000, 10], max_new_tokens=50, budget=1000) == [[0], [1]]


def test_tokens_after_the_stop_id_are_cut_off_and_not_counted():
    assert cut_at_stop([4, 5, 7, 7, 7], STOP) == ([4, 5], 3)
    assert cut_at_stop([4, 5], STOP) == ([4, 5], 2)
