"""Generate greedy answers with transformers, in a child process that returns its memory."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saigakit.core import launch, workspace
from saigakit.core.display import Progress
from saigakit.core.files import write_text
from saigakit.core.lazy import peft, torch, transformers
from saigakit.registry import Quantization
from saigakit.weights import adapter, load
from saigakit.weights.load import NumberFormat

OnProgress = Callable[[int, int], None]  # texts done, of how many
MAX_BATCH = 64  # measured: 305, 362 and 357 tokens/s on two cores with 32, 64 and 128; all wait for the longest answer
BATCH_TOKENS = 16_384  # of prompts, answers and padding


class Generated(NamedTuple):
    """Answers with the stop ids that end them; `seconds` is the time of generation only."""

    ids: list[list[int]]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.ids)) / self.seconds


class Request(NamedTuple):
    """What the child process generates: answers of the base and, if there is an adapter, of both."""

    prompts: list[list[int]]
    stop_ids: list[int]
    max_new_tokens: int
    base_dir: str
    adapter_dir: str | None
    quantization: Quantization
    number_format: NumberFormat


def in_child(request: Request, directory: Path) -> dict[str, Generated]:
    """{"before": …} and, with an adapter, {"after": …}; request and answers are files in `directory`."""
    request_file, answer_file = directory / "request.json", directory / "generated.json"
    request_file.write_text(json.dumps(request._asdict()), encoding="utf-8")
    launch.run([sys.executable, "-m", "saigakit.weights.generate", str(request_file), str(answer_file)])
    made = json.loads(answer_file.read_text(encoding="utf-8"))
    return {name: Generated(**values) for name, values in made.items()}


def answers(request: Request) -> dict[str, Generated]:
    """{"before": …} of the base, on the first GPU or the CPU, and, with an adapter, {"after": …}."""
    device, dtype = "cuda:0" if torch.cuda.is_available() else "cpu", getattr(torch, request.number_format)
    if device == "cpu" and load.bf16_is_faster():
        dtype = torch.bfloat16  # measured on 2 cores with AMX: 2.2 times as fast as float32 with bf16 products
    model: Any = load.base_model(Path(request.base_dir), request.quantization, dtype, device).eval()
    # The model's own may set a repetition penalty or sampling.
    model.generation_config = transformers.GenerationConfig()
    if request.adapter_dir is None:
        return {"before": answer(model, request, Progress("before"))}
    adapter.read_config(Path(request.adapter_dir))  # refuses what could make peft run code
    # Without autocast its matrices keep the type of the layers that they are added to.
    adapted: Any = peft.PeftModel.from_pretrained(model, request.adapter_dir, autocast_adapter_dtype=False)
    with adapted.disable_adapter():
        before = answer(model, request, Progress("before"))
    return {"before": before, "after": answer(model, request, Progress("after"))}


def answer(model: "transformers.PreTrainedModel", request: Request, on_progress: OnProgress) -> Generated:
    stop_ids, count = frozenset(request.stop_ids), len(request.prompts)
    start = time.perf_counter()
    on_progress(0, count)
    rows = greedy_in_batches(model, request.prompts, stop_ids, request.max_new_tokens, on_progress)
    seconds = time.perf_counter() - start
    on_progress(count, count)
    return Generated([row[: cut_at_stop(row, stop_ids)[1]] for row in rows], seconds)


def greedy_in_batches(
    model: "transformers.PreTrainedModel",
    prompts: Sequence[list[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    on_progress: OnProgress = lambda _done, _total: None,
) -> list[list[int]]:
    """Continue all prompts greedily, in batches that fit in memory; see `cut_at_stop`."""
    rows: list[list[int]] = [[] for _ in prompts]
    done = 0

    def report(ended: int) -> None:
        on_progress(min(done + ended, len(prompts) - 1), len(prompts))  # the caller reports the last one

    budget = min(BATCH_TOKENS, tokens_in_memory(model))
    for batch in plan_batches([len(prompt) for prompt in prompts], max_new_tokens, budget):
        generated = greedy(model, [prompts[i] for i in batch], stop_ids, max_new_tokens, report)
        for index, row in zip(batch, generated, strict=True):
            rows[index] = row
        done += len(batch)
    return rows


def greedy(
    model: "transformers.PreTrainedModel",
    prompts: Sequence[list[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    on_ended: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Continue a left-padded batch greedily; rows are padded after their stop id, see `cut_at_stop`."""
    width = max(map(len, prompts))
    pad = min(stop_ids)  # masked before a prompt, cut off after a stop id
    device = model.device
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)

    def watch(ids: "torch.Tensor", _scores: object, **_: object) -> "torch.Tensor":
        on_ended(int(torch.isin(ids[:, width:], stops).any(dim=1).sum()))
        return torch.zeros(len(ids), dtype=torch.bool, device=device)

    # For a slice of the hidden states torch would copy a frozen head for every row: 1.8 GB for 32 rows of SmolLM2.
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, hidden: (hidden[0].contiguous(),)):
        output: Any = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(stop_ids),
            pad_token_id=pad,
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
        )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def plan_batches(lengths: Sequence[int], max_new_tokens: int, budget: int) -> list[list[int]]:
    """Indices in batches of similar lengths, longest first, each within `budget` tokens and MAX_BATCH rows."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    while order:
        rows = max(1, min(MAX_BATCH, budget // (lengths[order[0]] + max_new_tokens)))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def cut_at_stop(row: Sequence[int], stop_ids: frozenset[int]) -> tuple[list[int], int]:
    """The ids before the first stop id, and the number generated including it."""
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    return (list(row), len(row)) if end is None else (list(row[:end]), end + 1)


def tokens_in_memory(model: "transformers.PreTrainedModel") -> int:
    """Tokens whose KV cache fits in half of the free memory."""
    config = model.config.get_text_config()
    heads = config.num_key_value_heads or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else workspace.available_memory()
    return max(1, int(free // 2 // per_token))


def main(request_file: str, answer_file: str) -> None:
    load.silence_libraries()
    request = Request(**json.loads(Path(request_file).read_text(encoding="utf-8")))
    with launch.child():
        made = {name: each._asdict() for name, each in answers(request).items()}
        write_text(Path(answer_file), json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
