"""Messages to input_ids and labels: special tokens come from the template alone, only the assistant is learned."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from saigakit import data, models, sources, template
from saigakit.errors import SaigaError
from saigakit.template import Message

if TYPE_CHECKING:
    import llama_cpp
    import tokenizers

IGNORE_INDEX = -100  # torch's cross_entropy: a position that is not learned
_BLANK = "\x1f"  # Jinja's trim and str.strip take it away, and no template spells it
_HOLDER = re.compile(f"({_BLANK}?)\U000f0000([0-9]+)\U000f0001({_BLANK}?)")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer(Protocol):
    """What `encode` needs; Hugging Face's and llama.cpp's give the same ids."""

    chat_template: str
    special_tokens: Mapping[str, int]
    variables: Mapping[str, str]  # bos_token, eos_token … as the template may name them

    def encode_text(self, text: str) -> list[int]:
        """Ids of ordinary text: what looks like a special token stays text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""


class FastTokenizer:
    """A tokenizer over the tokenizers library, without its special-token parsing."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", chat_template: str, variables: Mapping[str, str]) -> None:
        import tokenizers

        content = json.loads(tokenizer.to_str())
        self.special_tokens: Mapping[str, int] = {token["content"]: token["id"] for token in content["added_tokens"]}
        content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._text_only = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._special_ids = set(self.special_tokens.values())
        self.chat_template = chat_template
        self.variables: Mapping[str, str] = dict(variables)

    def encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._text_only.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._text_only.decode([i for i in ids if i not in self._special_ids])
        return text


class GgufTokenizer:
    """The tokenizer inside a GGUF file, by llama.cpp."""

    def __init__(self, llm: "llama_cpp.Llama") -> None:
        import llama_cpp

        self._llm = llm
        vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
        control = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        self.special_tokens: Mapping[str, int] = {
            llama_cpp.llama_vocab_get_text(vocabulary, i).decode("utf-8"): i
            for i in range(llm.n_vocab())
            if llama_cpp.llama_vocab_get_attr(vocabulary, i) & control
        }
        if "tokenizer.chat_template" not in llm.metadata:
            raise SaigaError("This GGUF holds no chat template, so its prompt format is unknown.")
        self.chat_template = llm.metadata["tokenizer.chat_template"]
        names = {i: token for token, i in self.special_tokens.items()}
        ids = {"bos_token": llm.token_bos(), "eos_token": llm.token_eos()}
        self.variables: Mapping[str, str] = {name: names[i] for name, i in ids.items() if i in names}

    def encode_text(self, text: str) -> list[int]:
        return self._llm.tokenize(text.encode("utf-8"), add_bos=False, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special_tokens.values())
        return self._llm.detokenize([i for i in ids if i not in special]).decode("utf-8", errors="replace")


def load_tokenizer(model: str, source: str | None = None) -> FastTokenizer:
    """The tokenizer of `model`; `source` as base_source: a directory instead of the Hub.

    Raises SaigaError when it is not the tokenizer that the model was trained with.
    """
    import tokenizers

    spec = models.find(model)
    directory = sources.tokenizer_dir(spec, source)
    if (directory / "tokenizer.json").is_file():
        raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    elif (directory / "tokenizer.model").is_file():
        raw = from_sentencepiece(directory / "tokenizer.model")
    else:
        raise SaigaError(f"{directory} has neither tokenizer.json nor tokenizer.model.")
    tokenizer = FastTokenizer(raw, template.of_model(spec, directory), _variables(directory))
    for text, ids in spec.golden_ids:
        if (got := tokenizer.encode_text(text)) != list(ids):
            raise SaigaError(
                f"{directory} is not the tokenizer of {spec.name}: {text!r} gives {got}, expected {list(ids)}."
            )
    return tokenizer


def from_sentencepiece(file: Path) -> "tokenizers.Tokenizer":
    """tokenizer.model with its scores and the prefix space after every special token (`legacy`), as in llama.cpp."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    spm: Any = sentencepiece_model_pb2  # protobuf makes its classes at run time
    proto = spm.ModelProto.FromString(file.read_bytes())
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = [
        (score, (text[:cut], text[cut:]))
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort(key=lambda item: -item[0])  # the best score merges first; ties in vocabulary order
    tokenizer = Tokenizer(
        BPE(vocabulary, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _variables(directory: Path) -> dict[str, str]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            found |= json.loads((directory / name).read_text(encoding="utf-8"))
    values = {name: found.get(name) for name in _NAMED_TOKENS}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def load_gguf_tokenizer(llm: "llama_cpp.Llama") -> GgufTokenizer:
    """The tokenizer of a loaded GGUF."""
    return GgufTokenizer(llm)


def encode(
    messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = False
) -> dict[str, list[int]]:
    """{"input_ids", "labels"} of a conversation; labels are IGNORE_INDEX but for what the assistant says.

    The template is rendered with a placeholder for each content and split at the special tokens that it spells;
    then the contents are put back into the runs of text between them. So a `</s>` in a content stays text.
    Raises SaigaError where the result would not be what the template renders, and where the template cannot be
    trained on: it must render turn by turn and end each turn.
    """
    contents = _contents(messages)
    masked = [{**message, "content": _holder(index, message["content"])} for index, message in enumerate(messages)]

    def rendered(count: int, prompt: bool) -> str:
        return template.render(
            masked[:count], tokenizer.chat_template, add_generation_prompt=prompt, **tokenizer.variables
        )

    text = rendered(len(messages), add_generation_prompt)
    _require_same(_fill(text, contents), messages, tokenizer, add_generation_prompt)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    rendered_turns = [(rendered(i, True), rendered(i + 1, False)) for i in turns]
    spans = _answer_spans(text, rendered_turns, tokenizer, must_exist=not add_generation_prompt)
    input_ids: list[int] = []
    labels: list[int] = []
    for start, part in _parts(text, tokenizer):
        span = next(((a, b) for a, b in spans if start < b and a < start + len(part)), None)
        if part in tokenizer.special_tokens:
            ids, learned_from = [tokenizer.special_tokens[part]], 0
        else:
            head = 0 if span is None else max(0, span[0] - start)
            ids, learned_from = _encode_run(_fill(part[:head], contents), _fill(part[head:], contents), tokenizer)
        input_ids += ids
        labels += [IGNORE_INDEX] * len(ids) if span is None or add_generation_prompt else _masked(ids, learned_from)
    return {"input_ids": input_ids, "labels": labels}


def _require_same(text: str, messages: Sequence[Message], tokenizer: Tokenizer, prompt: bool) -> None:
    whole = template.render(messages, tokenizer.chat_template, add_generation_prompt=prompt, **tokenizer.variables)
    if text != whole:
        begin = ", ".join(repr(message["content"][:30]) for message in messages)
        raise SaigaError(
            "The chat template does more to the contents than trim their ends, so they cannot be tokenised exactly. "
            f"Take out what it reacts to; the contents begin {begin}."
        )


def end_of_turn_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The token that ends the assistant's turn, learned last: what stops generation."""
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    return frozenset({[label for label in encode(turn, tokenizer)["labels"] if label != IGNORE_INDEX][-1]})


def _masked(ids: list[int], learned_from: int) -> list[int]:
    return [IGNORE_INDEX] * learned_from + ids[learned_from:]


def _answer_spans(
    text: str, turns: Iterable[tuple[str, str]], tokenizer: Tokenizer, *, must_exist: bool
) -> list[tuple[int, int]]:
    """(start, end) in `text` of each turn: after its generation prompt, up to the token that ends it.

    A prompt needs those of earlier turns, to have the ids that training saw, but does not insist on them.
    """
    spans = []
    for prompt, whole in turns:
        if not (whole.startswith(prompt) and text.startswith(whole)):
            if not must_exist:
                continue
            raise SaigaError("The chat template does not render turn by turn, so it cannot be trained on.")
        ends = [match.end() for match in _splitter(tuple(tokenizer.special_tokens)).finditer(whole, len(prompt))]
        if not ends:
            raise SaigaError("The chat template ends the assistant's turn without a special token.")
        spans.append((len(prompt), ends[-1]))
    return spans


@lru_cache
def _splitter(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _parts(text: str, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """(offset, part): the special tokens that the template spells and the runs of text between them."""
    start = 0
    for part in _splitter(tuple(tokenizer.special_tokens)).split(text):
        if part:
            yield start, part
        start += len(part)


def _contents(messages: Sequence[Message]) -> list[str]:
    """Raises SaigaError for a message that holds anything else: it would enter the prompt unmasked."""
    roles = sorted(set(data.ROLES.values()))
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in roles or not isinstance(message.get("content"), str) or len(message) != 2:
            raise SaigaError(
                f"Message {number} is {str(dict(message))[:80]}: it must have a role ({', '.join(roles)}), "
                "a content, which is text, and nothing else."
            )
    return [message["content"] for message in messages]


def _holder(index: int, content: str) -> str:
    """What stands for a content; nothing for an empty one, because templates ask whether there is any."""
    return f"{_BLANK}\U000f0000{index}\U000f0001{_BLANK}" if content else ""


def _fill(text: str, contents: Sequence[str]) -> str:
    """The contents in the place of their holders, stripped on the sides where the template stripped the holder."""

    def content(match: re.Match[str]) -> str:
        whole = contents[int(match[2])]
        whole = whole if match[1] else whole.lstrip()
        return whole if match[3] else whole.rstrip()

    return _HOLDER.sub(content, text)


def _encode_run(prompt: str, answer: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids of one run of text, and where in them the answer begins; the prompt's ids are those it has alone."""
    alone = tokenizer.encode_text(prompt) if prompt else []
    together = tokenizer.encode_text(prompt + answer)
    if together[: len(alone)] == alone:
        return together, len(alone)
    # A merge crosses the border ("\n" + "\n…"): inference starts after the prompt's own ids, so training does too.
    apart = alone + tokenizer.encode_text(answer)
    if tokenizer.decode(apart) != tokenizer.decode(together):
        raise SaigaError(f"The answer {answer[:40]!r} cannot be tokenised apart from its prompt {prompt[-40:]!r}.")
    return apart, len(alone)
