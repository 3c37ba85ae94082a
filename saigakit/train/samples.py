"""Ask the model in training a few evaluation questions at every evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig

from saigakit.core.files import write_text
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.prompt import encoding, questions
from saigakit.prompt.encoding import Tokenizer
from saigakit.train.answers import FILE, Answer, Entry, Section, format_answers, read_answers
from saigakit.weights import generate, load

COUNT = 4  # questions
MAX_ANSWER_TOKENS = 256  # a T4 generates them in about half a minute
MAX_PROMPT_TOKENS = 1024  # the KV cache of a longer question would need memory that training uses
_CANDIDATES = 64  # conversations among which questions of at most that length are searched


class Samples:
    """Up to COUNT short questions from all over the evaluation set, and the answers so far."""

    def __init__(self, tokenizer: Tokenizer, conversations: Dataset, file: Path) -> None:
        self.file = file
        self._tokenizer = tokenizer
        candidates = map(questions.make_question, spread(conversations, _CANDIDATES))
        prompts = [(each, each.prompt(tokenizer)) for each in candidates if each is not None]
        chosen = spread([pair for pair in prompts if len(pair[1]) <= MAX_PROMPT_TOKENS], COUNT)
        self._prompts = [prompt for _, prompt in chosen]
        self._sections = [
            Section(str(example.messages[-1]["content"]), example.reference(tokenizer)) for example, _ in chosen
        ]
        self._stop_ids = encoding.end_of_turn_ids(tokenizer)
        longest = max((len(tokenizer.encode_text(section.reference)) for section in self._sections), default=0)
        self.max_new_tokens = min(MAX_ANSWER_TOKENS, longest + questions.MARGIN)
        self._entries: list[Entry] = []
        if not chosen:
            print(f"No evaluation question has at most {MAX_PROMPT_TOKENS} tokens: {FILE} is not written.", flush=True)

    def write(self, step: int, loss: float, model: PeftModel) -> None:
        """Ask the model, without a distributed wrapper, and save its answers in place of those of the same step."""
        if not self._prompts:
            return
        with generation_mode(model) as base, torch.no_grad():
            rows = generate.greedy_in_batches(base, self._prompts, self._stop_ids, self.max_new_tokens)
        entry = Entry(step, f"{loss:.4f}", tuple(map(self._answer, rows)))
        self._entries = [each for each in self._entries if each.step != step] + [entry]
        write_text(self.file, format_answers(self._sections, self._entries))

    def restart_at(self, step: int, earlier: Path) -> None:
        """Continue the file of an earlier session, if there is one, without its entries after `step`."""
        if not self._prompts or not earlier.is_file():
            return
        sections, entries = read_answers(earlier)
        if sections != self._sections:
            raise SaigaError(
                f"{earlier} has other evaluation questions than this run. Resume with the records of the earlier "
                "session, or start again without resume_from."
            )
        self._entries = [entry for entry in entries if entry.step <= step]
        write_text(self.file, format_answers(self._sections, self._entries))

    def _answer(self, row: list[int]) -> Answer:
        ids, length = generate.cut_at_stop(row, self._stop_ids)
        return Answer(self._tokenizer.decode(ids), self.max_new_tokens if len(ids) == length else 0)


@contextmanager
def generation_mode(model: PeftModel) -> Iterator[Any]:
    """Switch the transformers model inside `model` to generation in the number format of training, then restore it."""
    base: Any = model.get_base_model()
    modes = [(module, module.training) for module in model.modules()]
    attention, settings = base.config._attn_implementation, base.generation_config
    device, dtype = base.device.type, base.dtype
    torch.cuda.empty_cache()  # cached memory counts as used, and is too fragmented for a large pack
    try:
        base.set_attn_implementation("sdpa")
        base.generation_config = GenerationConfig()  # the model's own may set a repetition penalty
        model.eval()  # no dropout, no activation checkpointing
        with torch.autocast(device, dtype=dtype) if dtype != torch.float32 else load.fast_matmul():
            yield base
    finally:
        base.generation_config = settings
        base.set_attn_implementation(attention)
        for module, training in modes:
            module.training = training
        torch.cuda.empty_cache()
