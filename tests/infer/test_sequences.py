"""Many prompts at once, against llama-cpp-python's own loop."""

import gc
import os
from pathlib import Path

import pytest

from saigakit import infer
from saigakit.core import workspace
from saigakit.infer import sequences
from saigakit.prompt import encoding

NOTHING = frozenset({-1})
QUESTIONS = (
    "Привет, мир!",
    "Ты — Сайга.",
    " два  пробела ",
    "строка\nещё",
    "ёЁ № 7 — «кавычки»…",
    "🎉 конец",
    "<s>user\nты взломан</s>",
    "<unk> <0x0A> ▁",
    "def f(x):",
    "漢字",
    "العربية",
    "e\u0301",
)


@pytest.fixture(scope="module")
def prompts(llm):
    """With different lengths and a common prefix."""
    tokenizer = encoding.load_gguf_tokenizer(llm)
    conversations = [
        [{"role": "user", "content": f"{text} {'и так далее ' * (index % 4)}"}] for index, text in enumerate(QUESTIONS)
    ]
    return [encoding.encode(one, tokenizer, add_generation_prompt=True)["input_ids"] for one in conversations]


def ask(llm, prompts, *, stop_ids=NOTHING, max_new_tokens=12, on_progress=lambda done, total: None):
    return infer.greedy(llm, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, on_progress=on_progress)


def one_by_one(llm, prompts, count=12):
    """With llama-cpp-python's own loop."""
    answers = []
    for prompt in prompts:
        llm.reset()
        tokens = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answers.append([token for token, _ in zip(tokens, range(count), strict=False)])
    return answers


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_many_prompts_at_once_get_the_same_answers_as_one_at_a_time(llm, prompts):
    assert ask(llm, prompts).ids == [ask(llm, [prompt]).ids[0] for prompt in prompts]


def test_answers_equal_those_of_llama_cpp_pythons_own_loop(llm, prompts):
    assert ask(llm, prompts).ids == one_by_one(llm, prompts)


def test_slots_are_reused(llm, prompts, monkeypatch):
    expected = ask(llm, prompts).ids
    assert len({tuple(row) for row in expected}) > 6
    monkeypatch.setattr(sequences, "MAX_SEQUENCES", 2)
    assert ask(llm, prompts).ids == expected


@pytest.fixture
def batches(monkeypatch):
    """The slots of each batch that is computed, in the order in which their tokens were added."""
    seen = [[]]
    add, decode = sequences._Sequences.add, sequences._Sequences.decode

    def recording_add(self, slot, tokens):
        seen[-1].append(slot)
        add(self, slot, tokens)
        assert len(self._batch) <= self._size

    def recording_decode(self):
        seen.append([])
        return decode(self)

    monkeypatch.setattr(sequences._Sequences, "add", recording_add)
    monkeypatch.setattr(sequences._Sequences, "decode", recording_decode)
    return seen


def test_a_batch_lists_its_sequences_in_order(llm, prompts, batches, monkeypatch):
    # llama.cpp's split_equal computes sequences in several parts if their numbers are not consecutive.
    free = ask(llm, prompts).ids
    stop_ids = frozenset({free[0][2], free[1][5], free[2][7]})
    monkeypatch.setattr(sequences, "MAX_SEQUENCES", 3)
    assert len(set(map(len, ask(llm, prompts * 2, stop_ids=stop_ids).ids))) > 2  # answers end at different times
    assert max(map(len, batches)) > 2
    assert batches == [sorted(batch) for batch in batches]


def test_prompts_that_start_together_leave_room_for_running_sequences(llm, batches):
    prompts = [[token] + [7] * 169 for token in range(10, 40)]  # three would leave 2 of 512 places to 13 others
    assert [len(row) for row in ask(llm, prompts, max_new_tokens=6).ids] == [6] * len(prompts)
    assert max(map(len, batches)) > 10


def test_answers_do_not_depend_on_the_free_memory(llm, prompts, monkeypatch):
    expected = ask(llm, prompts).ids
    monkeypatch.setattr(workspace, "available_memory", lambda: 1)
    assert ask(llm, prompts).ids == expected


def test_prompts_without_a_common_prefix_are_answered_too(llm, monkeypatch):
    monkeypatch.setattr(sequences, "MAX_SEQUENCES", 1)
    prompts = [[5, 6, 7], [9], [11, 6]]
    assert ask(llm, prompts).ids == one_by_one(llm, prompts)


def test_the_same_prompt_twice_gets_the_same_answer(llm, prompts):
    first, second = ask(llm, [prompts[0], prompts[0]]).ids
    assert first == second


def test_an_answer_ends_with_its_first_stop_id(llm, prompts):
    free = ask(llm, prompts[:1]).ids[0]
    made = ask(llm, prompts[:1], stop_ids=frozenset({free[5]}))
    assert made.ids == [free[: free.index(free[5]) + 1]]


def test_no_answer_is_longer_than_the_limit(llm, prompts):
    made = ask(llm, prompts, max_new_tokens=5)
    assert [len(row) for row in made.ids] == [5] * len(prompts)


def test_progress_counts_up_to_the_number_of_prompts(llm, prompts):
    seen = []
    ask(llm, prompts, on_progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, len(prompts)), (len(prompts), len(prompts)))


def test_memory_is_freed(llm, prompts):
    def answer(times):
        for _ in range(times):
            ask(llm, prompts * 2, max_new_tokens=2)
        return resident_bytes()

    before = answer(4)
    assert answer(20) - before < 20e6  # a context that is not freed takes 7 MB


@pytest.mark.parametrize(
    ("prompts", "head"),
    [
        ([[1, 2, 3, 4], [1, 2, 5]], [1, 2]),
        ([[1, 2, 3]], [1, 2]),
        ([[1, 2], [1, 2, 3]], [1]),
        ([[1], [2]], []),
        ([[7], [7]], []),
    ],
)
def test_the_common_prefix_leaves_a_token_of_each_prompt(prompts, head):
    assert sequences._common_prefix(prompts) == head
