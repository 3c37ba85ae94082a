"""Prompts to greedy answers by transformers; as a child process, so that the memory comes back."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.core import launch, workspace
from saigakit.core.display import Progress
from saigakit.core.files import write_text
from saigakit.registry import Quantization
from saigakit.weights import load

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

OnProgress = Callable[[int, int], None]  # texts done, of how many
MAX_BATCH = 32  # measured: 135 and 148 tokens/s of one core with 16 and 48; all wait for the longest answer
BATCH_TOKENS = 16_384  # prompt and answer, padding included


@dataclass(frozen=True)
class Generated:
    """Answers without the id that ended them; `seconds` of generation alone, `tokens` with the ending ids."""

    ids: list[list[int]]
    seconds: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the child process answers: with the base alone and, where there is an adapter, with it."""

    prompts: list[list[int]]
    stop_ids: list[int]
    max_new_tokens: int
    base_dir: str
    adapter_dir: str | None
    quantization: Quantization


def in_child(request: Request, directory: Path) -> dict[str, Generated]:
    """{"before": …} and, with an adapter, {"after": …}; the two files of the exchange stay in `directory`."""
    request_file, answer_file = directory / "request.json", directory / "generated.json"
    request_file.write_text(json.dumps(asdict(request)), encoding="utf-8")
    launch.run([sys.executable, "-m", "saigakit.weights.generate", str(request_file), str(answer_file)])
    found = json.loads(answer_file.read_text(encoding="utf-8"))
    return {name: Generated(**values) for name, values in found.items()}


def answer(request: Request) -> dict[str, Generated]:
    """The base is loaded once for both kinds of answers."""
    adapter_dir = None if request.adapter_dir is None else Path(request.adapter_dir)
    model = HfModel(Path(request.base_dir), adapter_dir, request.quantization)
    return {
        name: model.answers(
            request.prompts,
            adapted=name == "after",
            stop_ids=frozenset(request.stop_ids),
            max_new_tokens=request.max_new_tokens,
            on_progress=Progress(name),
        )
        for name in (("before",) if adapter_dir is None else ("before", "after"))
    }


class HfModel:
    """A base model in memory, its adapter beside it."""

    def __init__(self, base_dir: Path, adapter_dir: Path | None, quantization: Quantization) -> None:
        from peft import PeftModel
        from transformers import GenerationConfig

        self._model: Any = _load(base_dir, quantization)
        self._model.generation_config = GenerationConfig()  # the file may hold a repetition penalty or sampling
        self._adapted: Any = None
        if adapter_dir is not None:
            # Not upcast: its matrices run in the type of the layers that they are added to.
            self._adapted = PeftModel.from_pretrained(self._model, str(adapter_dir), autocast_adapter_dtype=False)

    def answers(
        self,
        prompts: Sequence[list[int]],
        *,
        adapted: bool,
        stop_ids: frozenset[int],
        max_new_tokens: int,
        on_progress: OnProgress,
    ) -> Generated:
        """Greedy, in left-padded batches of like lengths, the longest first."""
        import torch

        bare = self._adapted is not None and not adapted
        ids: list[list[int]] = [[] for _ in prompts]
        done = tokens = 0
        start = time.perf_counter()
        on_progress(0, len(prompts))
        budget = min(BATCH_TOKENS, tokens_in_memory(self._model))
        with self._adapted.disable_adapter() if bare else nullcontext():
            for batch in batches([len(prompt) for prompt in prompts], max_new_tokens, budget):
                asked, counting = [prompts[i] for i in batch], _counting_from(done, len(prompts), on_progress)
                with torch.inference_mode():
                    rows = greedy(self._model, asked, stop_ids, max_new_tokens, counting)
                for index, row in zip(batch, rows, strict=True):
                    ids[index], length = until_stop(row, stop_ids)
                    tokens += length
                done += len(batch)
        seconds = time.perf_counter() - start
        on_progress(done, len(prompts))
        return Generated(ids, seconds, tokens)


def greedy(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    on_ended: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """The likeliest continuations of one left-padded batch, as transformers gives them: see `until_stop`."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    width = max(map(len, prompts))
    pad = min(stop_ids)  # never attended to; after a stop id it is cut off again
    device = model.device
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)

    def watch(ids: "torch.Tensor", _scores: object, **_: object) -> "torch.Tensor":
        on_ended(int(torch.isin(ids[:, width:], stops).any(dim=1).sum()))
        return torch.zeros(len(ids), dtype=torch.bool, device=device)

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stop_ids),
        pad_token_id=pad,
    )
    output: Any = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _counting_from(done: int, total: int, on_progress: OnProgress) -> Callable[[int], None]:
    return lambda ended: on_progress(min(done + ended, total - 1), total)  # the last one is told at the end


def batches(lengths: Sequence[int], max_new_tokens: int, budget: int) -> list[list[int]]:
    """Indices in batches of like lengths, longest first, each within `budget` tokens and MAX_BATCH rows."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    while order:
        rows = max(1, min(MAX_BATCH, budget // (lengths[order[0]] + max_new_tokens)))
        found.append(order[:rows])
        order = order[rows:]
    return found


def until_stop(row: Sequence[int], stop_ids: frozenset[int]) -> tuple[list[int], int]:
    """The ids before the first stop id, and how many were generated, that one included."""
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    return (list(row), len(row)) if end is None else (list(row[:end]), end + 1)


def _load(base_dir: Path, quantization: Quantization) -> "PreTrainedModel":
    """On the first GPU where there is one, in the fastest number type that the hardware computes in."""
    import torch

    if torch.cuda.is_available():
        device, dtype = "cuda:0", torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    else:
        # Measured on 2 cores with AMX: bfloat16 generates 2.2 times as fast as float32 with bf16 products.
        device, dtype = "cpu", torch.bfloat16 if load.bf16_is_faster() else torch.float32
    model = load.base_model(base_dir, quantization, dtype, device)
    model.eval()
    return model


def tokens_in_memory(model: "PreTrainedModel") -> int:
    """Tokens whose keys and values fit in half of the free memory."""
    import torch

    config = model.config.get_text_config()
    heads = config.num_key_value_heads or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else workspace.available_memory()
    return max(1, int(free // 2 // per_token))


def main(request_file: str, answer_file: str) -> None:
    load.quiet()
    request = Request(**json.loads(Path(request_file).read_text(encoding="utf-8")))
    with launch.child():
        found: Mapping[str, Generated] = answer(request)
        write_text(Path(answer_file), json.dumps({name: asdict(made) for name, made in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
