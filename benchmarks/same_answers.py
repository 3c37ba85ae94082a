"""Compare the greedy answers of llama.cpp with those of Hugging Face, on the same float16 weights of SmolLM2.

    python benchmarks/same_answers.py [--prompts 200] [--tokens 32] [--adapter runs/demo/02_train]

Hugging Face computes in float32. A different token counts as a tie if Hugging Face's two best logits are within 0.01.
The rms is that of all logits of 20 answers, token by token.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
import transformers

from saigakit import export
from saigakit.core.display import Table
from saigakit.demo import wordnet_records
from saigakit.export.merge_plan import MergePlan
from saigakit.export.other_formats import to_safetensors
from saigakit.prompt import encoding, questions
from saigakit.weights import generate

MODEL, TIE, SAMPLE = "smollm2_135m", 1e-2, 20
VARIANTS = {"f16": (1, False), "f16, flash attention": (1, True), "q8_0, flash attention": (8, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--adapter", help="an adapter of the demo, to compare the answers of its merged model")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(compare(Path(scratch), count=given.prompts, tokens=given.tokens, adapter=given.adapter))


def compare(
    directory: Path, *, count: int, tokens: int, adapter: str | None = None, threads: int | None = None
) -> Table:
    """A row for each number format of the cache, with and without flash attention."""
    file = export.to_gguf(model=MODEL, adapter=adapter, output=directory / "f16.gguf", quant_type="F16")
    merged = to_safetensors(MergePlan.of(MODEL, adapter), directory / "merged", "float16")
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float16).float().eval()
    prompts = read_prompts(count)
    answers = generate.greedy_in_batches(model, prompts, frozenset({model.config.eos_token_id}), tokens)
    rows = []
    for name, (cache_type, flash) in VARIANTS.items():
        with open_context(file, cache_type, flash, max(map(len, prompts)) + tokens + 1, threads) as llm:
            found = [compare_answer(llm, model, *pair) for pair in zip(prompts, answers, strict=True)]
            pairs = list(zip(prompts, answers, strict=True))[:SAMPLE]
            rms = np.sqrt(np.mean([squared_error(llm, model, *pair) for pair in pairs]))
        counts = [str(found.count(kind)) for kind in ("same", "tie", "different")]
        rows.append((name, *counts, f"{rms:.4f}"))
    deviation = spread(model, prompts[0])
    note = f"{count} prompts, up to {tokens} tokens; the standard deviation of the logits is {deviation:.2f}."
    return Table(("cache", "same", "ties", "different", "rms of logits"), rows, note)


def read_prompts(count: int) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as scratch:
        _, held_out = wordnet_records.write_records(Path(scratch), train=1, held_out=count)
        tokenizer = encoding.load_tokenizer(MODEL)
        return [question.prompt(tokenizer) for question in questions.read_examples(held_out)]


@contextmanager
def open_context(
    file: Path, cache_type: int, flash: bool, n_ctx: int, threads: int | None
) -> Iterator[llama_cpp.Llama]:
    settings: dict[str, Any] = {"type_k": cache_type, "type_v": cache_type, "flash_attn": flash}
    with closing(llama_cpp.Llama(str(file), n_ctx=n_ctx, n_threads=threads, verbose=False, **settings)) as llm:
        yield llm


def last_logits(llm: llama_cpp.Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),))


def compare_answer(llm: llama_cpp.Llama, model: Any, prompt: list[int], answer: Sequence[int]) -> str:
    """ "same", or whether the first other token is a "tie" or "different"."""
    llm.reset()
    llm.eval(prompt)
    for position, token in enumerate(answer):
        if (ours := int(last_logits(llm).argmax())) != token:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer[:position]]])).logits[0, -1]
            return "tie" if float(logits.max() - logits[[ours, token]].min()) < TIE else "different"
        llm.eval([token])
    return "same"


def squared_error(llm: llama_cpp.Llama, model: Any, prompt: list[int], answer: Sequence[int]) -> float:
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt, *answer]])).logits[0].numpy()
    llm.reset()
    errors = []
    for token, row in zip([*prompt, *answer], expected, strict=True):
        llm.eval([token])
        errors.append(float(np.mean((last_logits(llm) - row) ** 2)))
    return float(np.mean(errors))


def spread(model: Any, prompt: list[int]) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([prompt])).logits.std())


if __name__ == "__main__":
    main()
