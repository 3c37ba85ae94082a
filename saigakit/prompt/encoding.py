"""Messages to input_ids and labels: special tokens come from the template alone, only the assistant is learned."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit import registry
from saigakit.errors import DataError, SaigaError
from saigakit.prompt import template
from saigakit.prompt.backends import FastTokenizer, GgufTokenizer, Ids, Tokenizer, from_json, from_sentencepiece
from saigakit.prompt.layout import Layout, NotTurnByTurnError
from saigakit.prompt.layout import of as layout_of
from saigakit.prompt.template import Message
from saigakit.registry import ModelSpec
from saigakit.weights import find

if TYPE_CHECKING:
    import llama_cpp
    import tokenizers

__all__ = ["IGNORE_INDEX", "FastTokenizer", "GgufTokenizer", "Tokenizer", "encode", "from_sentencepiece"]
IGNORE_INDEX = -100  # torch's cross_entropy: a position that is not learned
Example = dict[str, Ids]  # "input_ids" and "labels" of one conversation
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBE = (
    {"role": "user", "content": "Привет,  мир!\n\n\n\n\tЕщё   раз:\n        return"},
    {"role": "assistant", "content": "Здравствуй!"},
)


def load_tokenizer(model: str, source: str | None = None) -> FastTokenizer:
    """The tokenizer of `model`; `source` as base_source: a directory instead of the Hub.

    Raises SaigaError when it is not the tokenizer that the model was trained with, and when it treats text around
    special tokens in a way that `encode` cannot give.
    """
    spec = registry.find(model)
    return read_tokenizer(spec, find.tokenizer_dir(spec, source))


def read_tokenizer(spec: ModelSpec, directory: Path) -> FastTokenizer:
    """Load the tokenizer of `spec` from the directory that `find.tokenizer_dir` found."""
    raw = _raw(directory)
    tokenizer = FastTokenizer(raw, template.of_model(spec, directory), _variables(directory))
    for text, ids in spec.golden_ids:
        if (got := tokenizer.encode_text(text)) != list(ids):
            raise SaigaError(
                f"{directory} is not the tokenizer of {spec.name}: {text!r} gives {got}, expected {list(ids)}."
            )
    require_as_a_whole(raw, tokenizer)
    return tokenizer


def _raw(directory: Path) -> "tokenizers.Tokenizer":
    """Of tokenizer.model where there is one: a tokenizer.json that was made of it may have lost its scores."""
    if (directory / "tokenizer.json").is_file():
        found = from_json(directory / "tokenizer.json")
        is_sentencepiece = json.loads(found.to_str())["model"].get("byte_fallback")
        if not is_sentencepiece or not (directory / "tokenizer.model").is_file():
            return found
        return from_sentencepiece(directory / "tokenizer.model", found)
    if (directory / "tokenizer.model").is_file():
        return from_sentencepiece(directory / "tokenizer.model")
    raise SaigaError(f"{directory} has neither tokenizer.json nor tokenizer.model.")


def require_as_a_whole(raw: "tokenizers.Tokenizer", tokenizer: FastTokenizer) -> None:
    """Raises SaigaError where an ordinary dialogue has other ids than `raw` gives its rendered text as a whole.

    Or its prompt and its answer, each as a whole: a merge may cross the border, and inference begins at it.
    """

    def rendered(messages: Sequence[Message], prompt: bool) -> str:
        variables = tokenizer.variables
        return template.render(messages, tokenizer.chat_template, add_generation_prompt=prompt, variables=variables)

    def ids(text: str) -> Ids:
        return raw.encode(text, add_special_tokens=False).ids

    text, prompt = rendered(_PROBE, False), rendered(_PROBE[:1], True)
    whole, ours = ids(text), encode(_PROBE, tokenizer)["input_ids"]
    if ours not in (whole, ids(prompt) + ids(text.removeprefix(prompt))):
        raise SaigaError(
            f"This tokenizer gives {text!r} the ids {whole}, and piece by piece, as saigakit does so that nothing in "
            f"a text becomes a special token, they are {ours}. saigakit cannot train this model."
        )


def _variables(directory: Path) -> dict[str, str]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            try:
                found |= json.loads((directory / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise SaigaError(f"{directory / name} is damaged ({error}); fetch it again.") from None
    values = {name: found.get(name) for name in _NAMED_TOKENS}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


@lru_cache(maxsize=1)  # seconds for a vocabulary of 131,072 tokens, and each answer asks for it
def load_gguf_tokenizer(llm: "llama_cpp.Llama") -> GgufTokenizer:
    """The tokenizer of a loaded GGUF."""
    return GgufTokenizer(llm)


def encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | str | None = None,
    add_generation_prompt: bool = False,
) -> Example:
    """{"input_ids", "labels"} of a conversation; labels are IGNORE_INDEX but for what the assistant says.

    The template is rendered with a placeholder for each text of the user and split at the special tokens that it
    spells; then the texts are put back into the runs between them. So a `</s>` in a text stays text.
    `tools` are OpenAI's descriptions of functions, as objects or as JSON text; an answer with "weight": 0 is only
    read, as in OpenAI's files for fine-tuning. Raises SaigaError where the result would not be what the template
    renders, and where the template cannot be trained on: it must end each turn and, for more than one answer, render
    turn by turn (see `encode_rows`).
    """
    layout = layout_of(messages, tools, tokenizer, add_generation_prompt)
    return _assembled([layout], tokenizer)[0]


def encode_rows(
    conversations: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    named: Callable[[int], str] = lambda index: f"conversation {index + 1}",
) -> list[list[Example]]:
    """The rows that each conversation is trained as: one, but for templates that render the last answer otherwise than
    those before it (Qwen3): there one for each answer, that answer learned. Of those that have more than `limit` tokens
    only the last is made, for its length: a long talk has as many rows as answers.

    Quicker than `encode` of each: one call of the tokenizer for all. Raises DataError with every conversation that
    cannot be tokenised; `named`: what it is called there.
    """
    layouts: list[Layout] = []
    several: dict[int, list[Example]] = {}  # by the number of the conversation
    problems: list[str] = []
    for index, conversation in enumerate(conversations):
        messages, tools = conversation["messages"], conversation.get("tools")
        try:
            try:
                layouts.append(layout_of(messages, tools, tokenizer, False))
            except NotTurnByTurnError:
                several[index] = _one_by_one(messages, tools, tokenizer, limit)
        except SaigaError as error:
            problems.append(f"{named(index)}: {error}")
    if problems:
        raise DataError(f"{len(problems)} conversations cannot be tokenised.", problems)
    single = iter(_assembled(layouts, tokenizer))
    return [several[index] if index in several else [next(single)] for index in range(len(layouts) + len(several))]


def _one_by_one(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | str | None,
    tokenizer: Tokenizer,
    limit: int | None,
) -> list[Example]:
    made: list[Example] = []
    *before, whole = one_answer_each(messages)
    for up_to in before:
        row = encode(up_to, tokenizer, tools=tools)
        if limit is not None and len(row["input_ids"]) > limit:
            break
        made.append(row)
    return [*made, encode(whole, tokenizer, tools=tools)]


def one_answer_each(messages: Sequence[Message]) -> list[list[Message]]:
    """For each answer that is learned the conversation up to it, with the answers before it only read."""
    ends = [i for i, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]
    return [[*map(_only_read, messages[:end]), messages[end]] for end in ends]


def _only_read(message: Message) -> Message:
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def _assembled(layouts: Sequence[Layout], tokenizer: Tokenizer) -> list[Example]:
    """Each text is tokenised once: system prompts, headers and line ends repeat."""
    runs = [part for layout in layouts for part in layout if part.special_id is None]
    texts = dict.fromkeys([part.text for part in runs])
    texts |= dict.fromkeys([part.prompt for part in runs if part.prompt])
    ids_of = dict(zip(texts, tokenizer.encode_texts(list(texts)), strict=True))
    return [_example(layout, ids_of, tokenizer) for layout in layouts]


def _example(layout: Layout, ids_of: Mapping[str, Ids], tokenizer: Tokenizer) -> Example:
    input_ids: Ids = []
    labels: Ids = []
    for part in layout:
        ids, learned_from = [part.special_id] if part.special_id is not None else ids_of[part.text], 0
        if part.prompt:
            ids, learned_from = _split_run(part.text, part.prompt, ids, ids_of[part.prompt], tokenizer)
        input_ids += ids
        labels += [IGNORE_INDEX] * learned_from + ids[learned_from:] if part.is_learned else [IGNORE_INDEX] * len(ids)
    return {"input_ids": input_ids, "labels": labels}


def _split_run(text: str, prompt: str, together: Ids, alone: Ids, tokenizer: Tokenizer) -> tuple[Ids, int]:
    """Ids of one run of text, and where in them the answer begins; the prompt's ids are those it has alone."""
    if together[: len(alone)] == alone:
        return together, len(alone)
    # A merge crosses the border ("\n" + "\n…"): inference starts after the prompt's own ids, so training does too.
    answer = text[len(prompt) :]
    apart = alone + tokenizer.encode_text(answer)
    if tokenizer.decode(apart) != tokenizer.decode(together):
        raise SaigaError(f"The answer {answer[:40]!r} cannot be tokenised apart from its prompt {prompt[-40:]!r}.")
    return apart, len(alone)


def end_of_turn_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The token that ends the assistant's turn, learned last: what stops generation."""
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    return frozenset({[label for label in encode(turn, tokenizer)["labels"] if label != IGNORE_INDEX][-1]})
