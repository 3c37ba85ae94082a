"""Answers during training."""

import gc
import random

import numpy as np
import pytest
import torch

from saigakit import data
from saigakit.data import store
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.registry import Lora
from saigakit.train import answers, layers, samples
from saigakit.train.samples import Samples
from saigakit.train.steps import collate
from saigakit.weights import generate, load

LORA = Lora(rank=4, alpha=8, dropout=0.3)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return encoding.load_tokenizer("saiga_tiny")


@pytest.fixture(scope="module")
def held_out(tiny):
    return data.read_conversations(tiny / "records.jsonl")


def conversation(question, answer="Да."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def in_training(tiny, quantization="none", *, on_gpu=True):
    """A model set up as in 02_train: packed attention, no cache, and with `on_gpu` activation checkpointing."""
    torch.manual_seed(0)
    base = load.base_model(tiny / "base", quantization, torch.float32, "cpu")
    base.config.use_cache = False
    layers.use_packed_attention(base)
    if on_gpu:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    return load.with_adapter(base, tiny / "adapter", LORA).train()


def learn(model, rows, steps, between=lambda step: None):
    """Losses and adapter weights of a few optimizer steps with dropout, with `between` called before each."""
    model.active_peft_config.lora_dropout = 0.3
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    torch.manual_seed(5)
    for step in range(steps):
        between(step)
        loss = model(**collate(rows[3 * step : 3 * step + 3]), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [parameter.detach().clone() for parameter in trained]


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_samples_leave_training_bit_identical(tiny, tokenizer, held_out, tmp_path, quantization, on_gpu):
    rows = [encoding.encode(row["messages"], tokenizer) for row in held_out.select(range(12))]
    asked = Samples(tokenizer, held_out, tmp_path / "samples.md")
    without = learn(in_training(tiny, quantization, on_gpu=on_gpu), rows, 4)
    model = in_training(tiny, quantization, on_gpu=on_gpu)
    with_samples = learn(model, rows, 4, lambda step: asked.write(step, 1.0, model))
    assert with_samples[0] == without[0]
    assert all(map(torch.equal, with_samples[1], without[1]))
    assert len(set(without[0])) == 4  # the model does train


def state(model):
    base = model.get_base_model()
    modes = {name: module.training for name, module in model.named_modules()}
    kept = (
        base.config._attn_implementation,
        base.config.use_cache,
        base.generation_config,
        base.is_gradient_checkpointing,
    )
    return modes, kept, torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def test_generation_restores_the_model(tiny, tokenizer, held_out, tmp_path):
    model = in_training(tiny)
    model.get_submodule("base_model.model.model.layers.1").eval()  # so that modules differ in their mode
    before = state(model)
    Samples(tokenizer, held_out, tmp_path / "samples.md").write(0, 1.0, model)
    assert state(model) == before
    assert before[1][0] == layers.PACKED_ATTENTION


def test_failed_generation_restores_the_model(tiny, tokenizer, held_out, tmp_path, monkeypatch):
    model = in_training(tiny)
    before = state(model)

    def fail(base, *_):
        assert not base.training and base.config._attn_implementation == "sdpa"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generate, "greedy", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Samples(tokenizer, held_out, tmp_path / "samples.md").write(0, 1.0, model)
    assert state(model) == before
    assert not (tmp_path / "samples.md").exists()


def live_bytes():
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


def test_samples_leak_no_tensor(tiny, tokenizer, held_out, tmp_path):
    model = in_training(tiny)
    asked = Samples(tokenizer, held_out, tmp_path / "samples.md")
    before = live_bytes()
    asked.write(0, 1.0, model)
    assert live_bytes() == before > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_samples_leak_no_gpu_memory(tiny, tokenizer, held_out, tmp_path):
    model = in_training(tiny).to("cuda")
    asked = Samples(tokenizer, held_out, tmp_path / "samples.md")
    before = torch.cuda.memory_allocated()
    asked.write(0, 1.0, model)
    assert torch.cuda.memory_allocated() == before


def test_answers_equal_those_of_separate_generation(tiny, tokenizer, held_out, tmp_path):
    asked = Samples(tokenizer, held_out, tmp_path / "samples.md")
    asked.write(0, 1.0, in_training(tiny))
    expected = []
    for conversation in spread(held_out, 4):
        prompt = encoding.encode(conversation["messages"][:-1], tokenizer, add_generation_prompt=True)["input_ids"]
        request = generate.Request(
            prompts=[prompt],
            stop_ids=sorted(encoding.end_of_turn_ids(tokenizer)),
            max_new_tokens=asked.max_new_tokens,
            base_dir=str(tiny / "base"),
            adapter_dir=str(tiny / "adapter"),
            quantization="none",
            number_format="float32",
        )
        expected.append(tokenizer.decode(generate.answers(request)["after"].ids[0]))
    _, [entry] = answers.read_answers(tmp_path / "samples.md")
    assert [answer.text for answer in entry.answers] == expected
    assert len(set(expected)) > 1


def test_generates_in_half_precision_with_float32_norms_and_adapter(tiny, tokenizer, held_out, tmp_path):
    base = load.base_model(tiny / "base", "nf4", torch.bfloat16, "cpu")
    layers.use_packed_attention(base)
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
    asked = Samples(tokenizer, held_out, tmp_path / "samples.md")
    asked.write(0, 1.0, load.with_adapter(base, tiny / "adapter", LORA).train())
    assert len(answers.read_answers(tmp_path / "samples.md")[1]) == 1


class Script:
    """Generation with known answers."""

    def __init__(self, monkeypatch, tokenizer):
        self.texts, self.tokenizer = ["Да."], tokenizer
        monkeypatch.setattr(generate, "greedy", self)

    def __call__(self, _model, prompts, stop_ids, _max_new_tokens, _on_ended):
        ids = [self.tokenizer.encode_text(text) for text in self.texts]
        return [[*ids[index % len(ids)], *stop_ids] for index in range(len(prompts))]


@pytest.fixture
def script(monkeypatch, tokenizer):
    return Script(monkeypatch, tokenizer)


@pytest.fixture(scope="module")
def model(tiny):
    return in_training(tiny)


def test_file_shows_question_right_answer_and_answers_by_step(script, model, tokenizer, tmp_path):
    file = tmp_path / "samples.md"
    asked = Samples(tokenizer, store.as_dataset([conversation("Что такое азот?", "Газ.")]), file)
    asked.write(0, 2.34567, model)
    script.texts = ["Это газ.\n## 2\n**жирный**"]
    asked.write(40, 0.5, model)
    text = file.read_text(encoding="utf-8")
    frame = ["    Что такое азот?", "    Газ.", "**Шаг 0, loss 2.3457 · step 0, loss 2.3457**", "    Да.",
             "**Шаг 40, loss 0.5000 · step 40, loss 0.5000**", "    Это газ.\n    ## 2\n    **жирный**"]  # fmt: skip
    places = [text.index(part) for part in frame]
    assert places == sorted(places)
    assert "cut at" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["samples.md"]


@pytest.mark.parametrize(
    "text", ["", "    отступ\n\n", "a\r\nb", "**Шаг 1, ошибка 1 · x**", "раз\u2028два\x85", "\n## 2\n"]
)
def test_questions_and_answers_round_trip(script, model, tokenizer, tmp_path, text):
    script.texts = [text]
    asked = Samples(
        tokenizer, store.as_dataset([conversation(f"1{text}"), conversation("Два?", f"{text}2")]), tmp_path / "s.md"
    )
    asked.write(0, 1.0, model)
    sections, [entry] = answers.read_answers(tmp_path / "s.md")
    assert sections == [(f"1{text}", "Да."), ("Два?", f"{text}2")]
    said = tokenizer.decode(tokenizer.encode_text(text))
    assert [answer.text for answer in entry.answers] == [said, said]


def test_marks_a_truncated_answer(tokenizer, tiny, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_ANSWER_TOKENS", 3)
    Samples(tokenizer, held_out, tmp_path / "s.md").write(0, 1.0, in_training(tiny))
    assert "обрезан на 3 токенах · step 0, loss 1.0000, cut at 3 tokens" in (tmp_path / "s.md").read_text("utf-8")
    (tmp_path / "s.md").rename(tmp_path / answers.FILE)
    assert any(row[2].endswith(" …") for row in answers.answers_table(tmp_path).rows)


def test_resumed_samples_equal_uninterrupted_ones(script, model, tokenizer, tmp_path):
    held_out = store.as_dataset(conversation(f"Вопрос {number}?") for number in range(9))
    whole, resumed = tmp_path / "whole.md", tmp_path / "resumed.md"

    def go(asked, steps):
        for step in steps:
            script.texts = [f"ответ {step}"]
            asked.write(step, 1 / (step + 3), model)

    go(Samples(tokenizer, held_out, whole), [0, 10, 20, 30])
    go(Samples(tokenizer, held_out, resumed), [0, 10, 20])
    again = Samples(tokenizer, held_out, resumed)
    again.restart_at(14, resumed)
    assert "step 20" not in resumed.read_text(encoding="utf-8")
    go(again, [20, 30])
    assert resumed.read_bytes() == whole.read_bytes()


def test_resuming_without_a_file_starts_one(script, model, tokenizer, tmp_path):
    asked = Samples(tokenizer, store.as_dataset([conversation("А?")]), tmp_path / "s.md")
    asked.restart_at(5, tmp_path / "s.md")
    asked.write(10, 1.0, model)
    assert "step 10" in (tmp_path / "s.md").read_text(encoding="utf-8")


def test_refuses_to_resume_a_file_with_other_questions(script, model, tokenizer, tmp_path):
    file = tmp_path / "s.md"
    Samples(tokenizer, store.as_dataset([conversation("А?")]), file).write(0, 1.0, model)
    before = file.read_bytes()
    with pytest.raises(SaigaError, match="other evaluation questions"):
        Samples(tokenizer, store.as_dataset([conversation("Б?")]), file).restart_at(5, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "# пусто", "## 1\n\n**Вопрос**\n", "\n## 1\n**a**\n    b\n**c**\n    d\n**e**\n"]
)
def test_reports_a_damaged_file(tokenizer, tmp_path, content):
    file = tmp_path / "s.md"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SaigaError, match=r"s\.md is damaged"):
        Samples(tokenizer, store.as_dataset([conversation("А?")]), file).restart_at(5, file)


def test_asks_the_last_turn_of_four_conversations_from_all_over_the_file(script, model, tokenizer, tmp_path):
    longer = {"messages": [*conversation("Раз?")["messages"], *conversation("Два?", "Третий.")["messages"]]}
    held_out = store.as_dataset([longer, *(conversation(f"Вопрос {number}?") for number in range(1, 100))])
    Samples(tokenizer, held_out, tmp_path / "s.md").write(0, 1.0, model)
    sections, _ = answers.read_answers(tmp_path / "s.md")
    assert sections[0] == ("Два?", "Третий.")
    numbers = [int(question.split()[1].rstrip("?")) for question, _ in sections[1:]]
    assert all(abs(found - wanted) <= 2 for found, wanted in zip(numbers, (25, 50, 75), strict=True))


def test_skips_long_questions_and_reports_if_none_is_left(model, tokenizer, tmp_path, script, capsys):
    long = conversation("азот " * samples.MAX_PROMPT_TOKENS)
    Samples(tokenizer, store.as_dataset([long, conversation("А?")]), tmp_path / "s.md").write(0, 1.0, model)
    assert answers.read_answers(tmp_path / "s.md")[0] == [("А?", "Да.")]
    assert capsys.readouterr().out == ""
    Samples(tokenizer, store.as_dataset([long]), tmp_path / "none.md").write(0, 1.0, model)
    assert "No evaluation question has at most 1024 tokens" in capsys.readouterr().out
    assert not (tmp_path / "none.md").exists()


def test_answers_table_shows_first_and_last_answers(script, model, tokenizer, tmp_path):
    asked = Samples(tokenizer, store.as_dataset([conversation("А?"), conversation("Б?")]), tmp_path / answers.FILE)
    for step, text in ((0, "не знаю"), (10, "может быть"), (20, "да")):
        script.texts = [text]
        asked.write(step, 1 / (step + 1), model)
    shown = answers.answers_table(tmp_path)
    assert shown.header[2:] == ("шаг 0 · step 0", "шаг 20 · step 20")
    assert list(shown.rows) == [("А?", "Да.", "не знаю", "да"), ("Б?", "Да.", "не знаю", "да")]
    assert "1.0000 → 0.0476" in shown.note and "3 steps" in shown.note


def test_answers_table_without_samples_says_so(tmp_path):
    assert "no evaluation questions" in str(answers.answers_table(tmp_path))
