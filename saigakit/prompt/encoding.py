"""Tokenise conversations and mark which tokens are trained."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from saigakit import registry
from saigakit.core.lazy import llama_cpp, tokenizers
from saigakit.errors import DataError, SaigaError
from saigakit.prompt import template
from saigakit.prompt.backends import FastTokenizer, GgufTokenizer, Ids, Tokenizer, from_json_file, from_sentencepiece
from saigakit.prompt.layout import Layout, NotTurnByTurnError, build_layout
from saigakit.prompt.template import Message, Tools
from saigakit.registry import ModelSpec
from saigakit.weights import find
from saigakit.weights.base_files import read_json

__all__ = ["IGNORE_INDEX", "FastTokenizer", "GgufTokenizer", "Tokenizer", "encode", "from_sentencepiece"]
IGNORE_INDEX = -100  # torch's cross_entropy: a position that is not trained
Example = dict[str, Ids]  # "input_ids" and "labels" of one conversation
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBE = (
    {"role": "user", "content": "Привет,  мир!\n\n\n\n\tЕщё   раз:\n        return"},
    {"role": "assistant", "content": "Здравствуй!"},
)


def load_tokenizer(model: str, source: str | None = None, chat_template: str | None = None) -> FastTokenizer:
    """Load the tokenizer of `model`; `source` (base_source): a directory to use instead of the Hub.

    `chat_template` replaces the model's own; see `template.find_chat_template`.
    Raises SaigaError if the model was trained with another tokenizer, or if `encode` cannot reproduce its ids.
    """
    spec = registry.find(model)
    return read_tokenizer(spec, find.tokenizer_dir(spec, source), chat_template)


def read_tokenizer(spec: ModelSpec, directory: Path, chat_template: str | None = None) -> FastTokenizer:
    """Load the tokenizer of `spec` from the directory that `find.tokenizer_dir` found."""
    raw = _read_raw(directory)
    chosen = template.read_chat_template(spec, directory, chat_template)
    tokenizer = FastTokenizer(raw, chosen, _read_named_tokens(directory))
    _require_blanks(directory, tokenizer)
    for text, ids in spec.golden_ids:
        if (got := tokenizer.encode_text(text)) != list(ids):
            raise SaigaError(
                f"{directory} is not the tokenizer of {spec.name}: {text!r} gives {got}, expected {list(ids)}."
            )
    _require_same_ids(raw, tokenizer)
    return tokenizer


def _read_raw(directory: Path) -> "tokenizers.Tokenizer":
    """Prefer tokenizer.model: a tokenizer.json converted from it may have lost the scores."""
    as_json, as_model = directory / "tokenizer.json", directory / "tokenizer.model"
    if as_json.is_file():
        tokenizer = from_json_file(as_json)
        is_sentencepiece = json.loads(tokenizer.to_str())["model"].get("byte_fallback")
        return from_sentencepiece(as_model) if is_sentencepiece and as_model.is_file() else tokenizer
    if as_model.is_file():
        return from_sentencepiece(as_model)
    raise SaigaError(f"{directory} has neither tokenizer.json nor tokenizer.model.")


def _require_blanks(directory: Path, tokenizer: FastTokenizer) -> None:
    """AutoTokenizer of transformers 5.0 makes a tokenizer.json without them if it finds only a tokenizer.model."""
    name = tokenizer.variables.get("unk_token", "")
    if tokenizer.special_tokens.get(name) in tokenizer.encode_text(" "):
        raise SaigaError(
            f"The tokenizer in {directory} reads a blank as {name!r}, as transformers 5.0 saves one that it made from "
            "a tokenizer.model. Use the model's original files; train again what was trained with this tokenizer."
        )


def _require_same_ids(raw: "tokenizers.Tokenizer", tokenizer: FastTokenizer) -> None:
    """Compare with `raw` on the rendered text, in one piece or as prompt and answer, between which inference begins."""

    def render(messages: Sequence[Message], is_prompt: bool) -> str:
        variables = tokenizer.variables
        return template.render(messages, tokenizer.chat_template, add_generation_prompt=is_prompt, variables=variables)

    def raw_ids(text: str) -> Ids:
        return raw.encode(text, add_special_tokens=False).ids

    text, prompt = render(_PROBE, False), render(_PROBE[:1], True)
    expected, ours = raw_ids(text), encode(_PROBE, tokenizer)["input_ids"]
    if ours not in (expected, raw_ids(prompt) + raw_ids(text.removeprefix(prompt))):
        raise SaigaError(
            f"saigakit cannot train this model: its tokenizer gives {text!r} the ids {expected}, but {ours} when "
            "special tokens and texts are tokenised separately, which keeps special tokens out of texts."
        )


def _read_named_tokens(directory: Path) -> dict[str, str]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_json(directory / name, {})
    values = {name: settings.get(name) for name in _NAMED_TOKENS}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


@lru_cache(maxsize=1)  # takes seconds for a vocabulary of 131,072 tokens, and every answer needs it
def load_gguf_tokenizer(llm: "llama_cpp.Llama") -> GgufTokenizer:
    return GgufTokenizer(llm)


def encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Tools | str | None = None,
    add_generation_prompt: bool = False,
) -> Example:
    """Return "input_ids" and "labels"; labels are IGNORE_INDEX except for the assistant's words.

    The template is rendered with placeholders instead of the user's texts and split at its special tokens; then the
    texts are filled in, so a `</s>` in them stays text. `tools`: OpenAI's, as objects or JSON text. An answer with
    "weight": 0 is not trained, as in OpenAI's fine-tuning files. Raises SaigaError if the result would differ from the
    rendered template, or if the template does not end each turn or does not render turn by turn (see `encode_rows`).
    """
    return _assemble([build_layout(messages, tools, tokenizer, add_generation_prompt)], tokenizer)[0]


def encode_rows(
    conversations: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    label: Callable[[int], str] = lambda index: f"conversation {index + 1}",
) -> list[list[Example]]:
    """Encode each conversation as the rows it is trained on, with one call of the tokenizer for all.

    One row each, except for templates that render the final turn differently (Qwen3, Mistral-Nemo): they need one row
    per answer, with only that answer trained. Of those rows that exceed `limit` tokens only the last is made, for its
    length. Raises DataError with the `label` of every conversation that cannot be tokenised.
    """
    layouts: list[Layout] = []
    several: dict[int, list[Example]] = {}  # by the index of the conversation
    problems: list[str] = []
    for index, conversation in enumerate(conversations):
        messages, tools = conversation["messages"], conversation.get("tools")
        try:
            try:
                layouts.append(build_layout(messages, tools, tokenizer, False))
            except NotTurnByTurnError:
                several[index] = _encode_answers(messages, tools, tokenizer, limit)
        except SaigaError as error:
            problems.append(f"{label(index)}: {error}")
    if problems:
        raise DataError(f"Conversations that cannot be tokenised: {len(problems)}.", problems)
    single = iter(_assemble(layouts, tokenizer))
    return [several[index] if index in several else [next(single)] for index in range(len(layouts) + len(several))]


def _encode_answers(
    messages: Sequence[Message], tools: Tools | str | None, tokenizer: Tokenizer, limit: int | None
) -> list[Example]:
    rows: list[Example] = []
    *earlier, complete = cut_after_answers(messages)
    for shorter in earlier:
        row = encode(shorter, tokenizer, tools=tools)
        if limit is not None and len(row["input_ids"]) > limit:
            break
        rows.append(row)
    return [*rows, encode(complete, tokenizer, tools=tools)]


def trained_answers(messages: Sequence[Message]) -> list[int]:
    """The indices of the assistant's messages, except those with weight 0."""
    return [i for i, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]


def cut_after_answers(messages: Sequence[Message]) -> list[list[Message]]:
    """For each trained answer, the conversation up to it, with the earlier answers untrained."""
    untrained = [{**each, "weight": 0} if each["role"] == "assistant" else each for each in messages]
    return [[*untrained[:end], messages[end]] for end in trained_answers(messages)]


def _assemble(layouts: Sequence[Layout], tokenizer: Tokenizer) -> list[Example]:
    """Tokenise each distinct text once: system prompts, headers and line ends repeat."""
    runs = [part for layout in layouts for part in layout if part.special_id is None]
    texts = dict.fromkeys([part.text for part in runs])
    texts |= dict.fromkeys([part.prompt for part in runs if part.prompt])
    ids_of = dict(zip(texts, tokenizer.encode_texts(list(texts)), strict=True))
    return [_make_example(layout, ids_of, tokenizer) for layout in layouts]


def _make_example(layout: Layout, ids_of: Mapping[str, Ids], tokenizer: Tokenizer) -> Example:
    input_ids: Ids = []
    labels: Ids = []
    for part in layout:
        ids, start = [part.special_id] if part.special_id is not None else ids_of[part.text], 0
        if part.prompt:
            ids, start = _split_run(part.text, part.prompt, ids, ids_of[part.prompt], tokenizer)
        input_ids += ids
        labels += [IGNORE_INDEX] * start + ids[start:] if part.is_trained else [IGNORE_INDEX] * len(ids)
    return {"input_ids": input_ids, "labels": labels}


def _split_run(text: str, prompt: str, together: Ids, alone: Ids, tokenizer: Tokenizer) -> tuple[Ids, int]:
    """The ids of a run, beginning with those the prompt has alone, and the position where the answer begins."""
    if together[: len(alone)] == alone:
        return together, len(alone)
    # A merge crosses the border ("\n" + "\n…"): inference starts after the prompt's own ids, so training does too.
    answer = text[len(prompt) :]
    apart = alone + tokenizer.encode_text(answer)
    if tokenizer.decode(apart) != tokenizer.decode(together):
        raise SaigaError(f"The answer {answer[:40]!r} cannot be tokenised separately from its prompt {prompt[-40:]!r}.")
    return apart, len(alone)


def end_of_turn_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The last trained token of a turn, which stops generation."""
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    return frozenset({[label for label in encode(turn, tokenizer)["labels"] if label != IGNORE_INDEX][-1]})
