"""Measure answers with a GGUF: many at once, one stream, what a grammar costs and what forced tokens save.

    python benchmarks/infer.py runs/demo [--texts 100] [--rounds 3] [--threads 2] [--only forced]

RUN_DIR is that of `saigakit demo`. All ways of a table run in turns in each round, on the same texts; a ratio is the
median of the rounds, and its spread is given. Costs for larger models: the batches of tokens of a recorded run, each
with the time that such a batch takes on random weights of that shape.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import fit
import llama_cpp
import numpy as np

from saigakit import infer
from saigakit.core.display import Table
from saigakit.infer import constraint, engine, schema
from saigakit.prompt import encoding, questions
from saigakit.registry import Sampling
from saigakit.weights.model_shape import ModelShape

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"term": {"type": "string"}, "definition": {"type": "string"}},
        "required": ["term", "definition"],
    },
}
QUOTES = ("term", "definition")
LARGER = ModelShape(
    hidden=2048, layers=22, heads=32, kv_heads=4, head_dim=64, intermediate=5632, vocabulary=32000, tied=False
)  # 1.1 billion, as TinyLlama
GREEDY = Sampling(temperature=0.0)
SUPPORT = Path(__file__).parents[1] / "tests" / "support"
Ways = Mapping[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, help="one table instead of all")
    given = parser.parse_args()
    asked = questions.read_examples(given.run_dir / "01_format" / "held_out.jsonl")[: given.texts]
    file = given.run_dir / "03_merge_gguf" / "model.gguf"
    with closing(infer.load(file, n_ctx=2048, n_threads=given.threads)) as llm:
        for name, part in PARTS.items():
            if given.only in (None, name):
                print(f"{part(llm, asked, given.rounds)}\n", flush=True)


def in_turns(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round; one round before, which is not counted, warms the caches."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for each in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if each:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(first: Sequence[float], second: Sequence[float]) -> str:
    each = sorted(one / other for one, other in zip(first, second, strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f}-{each[-1]:.2f})"


def rows_of(seconds: Mapping[str, list[float]]) -> list[tuple[str, ...]]:
    """Each way with its median, and how many times as fast as the first one it is."""
    first = next(iter(seconds.values()))
    return [(name, f"{statistics.median(took):.2f}", ratios(first, took)) for name, took in seconds.items()]


def user_text(question: questions.Question) -> str:
    return str(question.messages[-1]["content"])


def tutorials_loop(llm: llama_cpp.Llama, prompts: Sequence[list[int]], limit: int) -> None:
    """One text after another, each prompt from its beginning."""
    ends = engine.stop_ids(llm)
    for prompt in prompts:
        llm.reset()
        tokens = itertools.islice(llm.generate(prompt, temp=0.0, repeat_penalty=1.0), limit)
        for _ in itertools.takewhile(lambda token: token not in ends, tokens):
            pass


def batches(llm: llama_cpp.Llama, asked: Sequence[questions.Question], rounds: int) -> Table:
    """100 extractions with a system prompt of 200 tokens."""
    tokenizer = encoding.load_gguf_tokenizer(llm)
    system = longer(str(asked[0].messages[0]["content"]), 200, tokenizer)
    texts = [user_text(each) for each in asked]
    messages = [[{"role": "system", "content": system}, {"role": "user", "content": text}] for text in texts]
    prompts = [encoding.encode(each, tokenizer, add_generation_prompt=True)["input_ids"] for each in messages]
    ends, silent = engine.stop_ids(llm), lambda _done, _total: None
    ways: Ways = {
        "the tutorial's loop": lambda: tutorials_loop(llm, prompts, 96),
        "infer.greedy": lambda: infer.greedy(llm, prompts, stop_ids=ends, max_new_tokens=96, on_progress=silent),
        "infer.extract_all": lambda: list(infer.extract_all(llm, texts, SCHEMA, system=system, max_new_tokens=96)),
        "the same, quotations": lambda: list(
            infer.extract_all(llm, texts, SCHEMA, quotes=QUOTES, system=system, max_new_tokens=96)
        ),
    }
    note = f"{len(texts)} texts, prompts of about {len(prompts[0])} tokens."
    return Table(("extractions", "seconds", "times as fast"), rows_of(in_turns(ways, rounds)), note)


def longer(text: str, count: int, tokenizer: encoding.Tokenizer) -> str:
    added = text
    while len(tokenizer.encode_text(text)) < count:
        text = f"{text} {added}"
    return text


def single(llm: llama_cpp.Llama, asked: Sequence[questions.Question], rounds: int) -> Table:
    """One stream against llama-cpp-python's own generator."""
    tokenizer = encoding.load_gguf_tokenizer(llm)
    some = asked[:12]

    def raw() -> None:
        for each in some:
            llm.reset()
            ends = engine.stop_ids(llm)
            for token in llm.generate(each.prompt(tokenizer), temp=0.0, repeat_penalty=1.0):
                if token in ends:
                    break

    def ours() -> None:
        for each in some:
            llm.reset()
            "".join(infer.stream(llm, each.messages, sampling=GREEDY))

    seconds = in_turns({"llama-cpp-python": raw, "infer.stream": ours}, rounds)
    return Table(("one stream", "seconds", "times as fast"), rows_of(seconds))


@contextlib.contextmanager
def without_forced_tokens() -> Iterator[None]:
    forced = constraint.Constraint._consume_forced
    constraint.Constraint._consume_forced = lambda self, count: []  # type: ignore[method-assign]
    try:
        yield
    finally:
        constraint.Constraint._consume_forced = forced  # type: ignore[method-assign]


def forced(llm: llama_cpp.Llama, asked: Sequence[questions.Question], rounds: int) -> Table:
    """One stream, prompt included, with and without what the grammar forces in one batch."""
    some, sizes = asked[:20], dict[str, list[int]]()
    evaluate = type(llm).eval

    def answer(name: str, *, quotes: Sequence[str], is_free: bool = False, is_forced: bool = True) -> None:
        sizes[name] = []
        type(llm).eval = lambda self, tokens: (sizes[name].append(len(tokens)), evaluate(self, tokens))[1]
        with contextlib.nullcontext() if is_forced else without_forced_tokens():
            for each in some:
                llm.reset()
                system = str(each.messages[0]["content"])
                if is_free:
                    "".join(infer.stream(llm, each.messages, sampling=GREEDY))
                else:
                    infer.extract(llm, user_text(each), SCHEMA, quotes=quotes, system=system)
        type(llm).eval = evaluate

    ways: Ways = {
        "free": lambda: answer("free", quotes=(), is_free=True),
        "schema": lambda: answer("schema", quotes=(), is_forced=False),
        "schema, forced": lambda: answer("schema, forced", quotes=()),
        "quotations": lambda: answer("quotations", quotes=QUOTES, is_forced=False),
        "quotations, forced": lambda: answer("quotations, forced", quotes=QUOTES),
    }
    seconds = in_turns(ways, rounds)
    cost = batch_costs(llm.n_threads)
    replayed = {name: [replay(found, cost)] for name, found in sizes.items()}
    rows = [(*row, str(len(sizes[row[0]])), ratios(replayed["free"], replayed[row[0]])) for row in rows_of(seconds)]
    header = ("one stream", "seconds", "times as fast", "batches", "1.1B shape, replayed")
    costs = ", ".join(f"{size}: {took / cost[1]:.2f}" for size, took in cost.items())
    return Table(header, rows, f"{len(some)} texts. Cost of a batch on the 1.1B shape, of one token: {costs}.")


def batch_costs(threads: int) -> dict[int, float]:
    """Seconds of a batch of so many tokens, on random weights."""
    with tempfile.TemporaryDirectory() as scratch:
        file = fit.random_model(Path(scratch) / "larger.gguf", LARGER)
        settings = {"n_ctx": 512, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        with closing(llama_cpp.Llama(str(file), **settings)) as llm:
            return {size: batch_seconds(llm, size) for size in (1, 2, 4, 8, 16, 32, 64, 128)}


def batch_seconds(llm: llama_cpp.Llama, size: int) -> float:
    took = []
    for _ in range(4):
        llm.reset()
        llm.eval([300 + index for index in range(32)])
        start = time.perf_counter()
        llm.eval([400 + index for index in range(size)])
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (1,)).sum()
        took.append(time.perf_counter() - start)
    return min(took)


def replay(sizes: Sequence[int], cost: Mapping[int, float]) -> float:
    return float(np.interp(sizes, list(cost), list(cost.values())).sum())


def first_token(llm: llama_cpp.Llama, asked: Sequence[questions.Question], rounds: int) -> Table:
    """Until the first piece of an answer, with a system prompt of 1,000 tokens."""
    system = longer(str(asked[0].messages[0]["content"]), 1000, encoding.load_gguf_tokenizer(llm))

    def ask(text: str) -> None:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        next(infer.stream(llm, messages, sampling=GREEDY))

    def first() -> None:
        llm.reset()
        ask(user_text(asked[0]))

    seconds = in_turns({"first question": first, "second question": lambda: ask(user_text(asked[1]))}, rounds)
    return Table(("first token", "seconds", "times as fast"), rows_of(seconds))


def grammar(llm: llama_cpp.Llama, asked: Sequence[questions.Question], rounds: int) -> Table:
    """What a token costs under a grammar with Nemo's vocabulary, against a step of the 1.1B shape."""
    sys.path.insert(0, str(SUPPORT))
    import vocabularies

    with tempfile.TemporaryDirectory() as scratch:
        nemo = vocabularies.pair("nemo-saiga_nemo", Path(scratch)).gguf._llm
        took = [grammar_seconds(nemo, each) for each in asked[:20]]
    step = batch_costs(llm.n_threads)[1]
    share = f"{100 * statistics.median(took) / step:.1f} %"
    rows = [("median", f"{1000 * statistics.median(took):.2f}", share), ("longest", f"{1000 * max(took):.2f}", "")]
    return Table(("grammar, 131,072 tokens", "ms a token", "of a step of 1.1B"), rows)


def grammar_seconds(llm: llama_cpp.Llama, asked: questions.Question) -> float:
    """Seconds a token of the reference answer, chosen from logits in which another token is the most likely."""
    text = user_text(asked)
    held = constraint.Constraint(llm, schema.make_grammar(schema.read_schema(SCHEMA, QUOTES), text))
    ids = encoding.load_gguf_tokenizer(llm).encode_text(str(asked.answer["content"]))
    logits = np.zeros(llm.n_vocab(), np.float32)
    spent, count = 0.0, 0
    position = len(held.begin())
    while position < len(ids) and not held.is_complete:
        logits[:] = 0
        logits[ids[position]], logits[7] = 1, 2
        start = time.perf_counter()
        position += len(held.choose(logits))
        spent, count = spent + time.perf_counter() - start, count + 1
    return spent / max(count, 1)


PARTS = {"batches": batches, "single": single, "forced": forced, "first-token": first_token, "grammar": grammar}

if __name__ == "__main__":
    main()
