"""Compare training, llama.cpp and each vocabulary's own library on ten thousand dialogues per real vocabulary."""

import base64
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import gguf
import pytest
import vocabularies
from dialogues import SPECIAL, Dialogue, dialogues
from matrix import matrix
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from vocabularies import CASES, Pair

from saigakit.core.files import sha256_of_text
from saigakit.errors import SaigaError
from saigakit.prompt import encoding, layout, placeholders
from saigakit.prompt.backends import vocabulary_sha256
from saigakit.prompt.encoding import IGNORE_INDEX, FastTokenizer, Tokenizer

COUNTS = [150, pytest.param(10_000, marks=pytest.mark.slow)]
# Half a minute to make: the largest vocabularies.
SLOW = {"nemo-saiga_nemo", "nemo-tools", "llama3-llama3", "qwen2-hermes_tools"}
# The character for the first special token, and those of all: no dialogue has them.
_MARK, _MARKS = 0x100000, re.compile("([\U00100000-\U001003ff])")
Example = dict[str, list[int]]
Encode = Callable[[Iterable[dict[str, Any]], Tokenizer], list[Example]]
_Failure = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module", params=matrix(CASES, CASES.keys() - SLOW))
def pair(request, tmp_path_factory) -> Iterator[Pair]:
    fixture = vocabularies.source_fixture(CASES[request.param][0])
    source = request.getfixturevalue(fixture) if fixture else None
    made = vocabularies.pair(request.param, tmp_path_factory.mktemp("vocabularies"), source)
    yield made
    made.gguf._llm.close()


@dataclass(frozen=True)
class Oracle:
    """The expected result, by transformers' renderer of a template that marks its own special tokens."""

    pair: Pair
    template: str
    variables: dict[str, str]
    names: dict[int, str]  # of the special tokens
    marks: dict[int, str]  # their characters

    @classmethod
    def of(cls, pair: Pair) -> "Oracle":
        marks = {text: chr(_MARK + number) for number, text in enumerate(pair.fast.special_tokens)}
        template = pair.fast.chat_template
        for text in sorted(marks, key=len, reverse=True):
            template = template.replace(text, marks[text])
        variables = {name: marks[text] for name, text in pair.fast.variables.items()}
        names = {i: text for text, i in pair.fast.special_tokens.items()}
        return cls(pair, template, variables, names, {i: marks[text] for i, text in names.items()})

    def marked(self, dialogue: Dialogue, count: int, *, prompt: bool = False) -> str:
        """Render the first messages, with one character for each special token of the template."""
        messages, tools = [dialogue.seen[:count]], dialogue.tools
        return render_jinja_template(
            messages, tools, None, self.template, add_generation_prompt=prompt, **self.variables
        )[0][0]

    def learned_turns(self, dialogue: Dialogue) -> list[int]:
        """The answers to train, or only the last if an earlier one is rendered differently when it is asked for."""
        if self.pair.is_split:
            whole = self.marked(dialogue, len(dialogue.messages))
            if not all(whole.startswith(self.marked(dialogue, turn + 1)) for turn in dialogue.turns):
                return dialogue.turns[-1:]
        return dialogue.turns

    def answer(self, dialogue: Dialogue, turn: int, text: str) -> str:
        """The trained part of a turn: from its generation prompt to its last special token in `text`."""
        prompt = self.marked(dialogue, turn, prompt=True)
        whole = text if turn + 1 == len(dialogue.messages) else self.marked(dialogue, turn + 1)
        assert whole.startswith(prompt)
        return whole[len(prompt) : [found.end() for found in _MARKS.finditer(whole)][-1]]

    def ids(self, dialogue: Dialogue, text: str) -> list[int] | None:
        """Tokenise with the vocabulary's own library; None if it would confuse a text with a special token."""
        if self.pair.is_sentencepiece:
            if any(piece in str(dialogue.conversation) for piece in self.pair.always_found):
                return None
            runs = filter(None, _MARKS.split(text))
            ids = {mark: i for i, mark in self.marks.items()}
            return [i for run in runs for i in ([ids[run]] if run in ids else self.pair.own(run))]
        # An answer that begins with a line end has its own ids, so that inference begins where training did.
        has_blank = any(each["role"] == "assistant" and each["content"][:1].isspace() for each in dialogue.messages)
        if has_blank or not dialogue.is_ordinary:
            return None
        # The last answer is asked for: a merge may cross the end of its prompt, and inference begins there.
        prompt = self.marked(dialogue, dialogue.turns[-1], prompt=True) if self.pair.is_split else ""
        names = {mark: self.names[i] for i, mark in self.marks.items()}
        named = [_MARKS.sub(lambda mark: names[mark[0]], each) for each in (prompt, text)]
        return self.pair.own(named[0]) + self.pair.own(named[1].removeprefix(named[0]))


def batched(items: Iterable[Dialogue], count: int) -> Iterator[list[Dialogue]]:
    iterator = iter(items)
    while batch := list(islice(iterator, count)):
        yield batch


def spelled(example: Example, oracle: Oracle) -> tuple[str, list[str]]:
    """Decode the ids with a mark for each special token; return the text and its trained stretches."""
    parts: list[tuple[str, bool]] = []
    run: list[tuple[int, bool]] = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        if token in oracle.names:
            parts += [*_decoded(run, oracle.pair), (oracle.marks[token], label == token)]
            run = []
        else:
            run.append((token, label == token))
    parts += _decoded(run, oracle.pair)
    learned, stretch = [], ""
    for text, is_learned in [*parts, ("", False)]:
        if not is_learned and stretch:
            learned.append(stretch)
        stretch = stretch + text if is_learned else ""
    return "".join(text for text, _ in parts), learned


def _decoded(run: Sequence[tuple[int, bool]], pair: Pair) -> list[tuple[str, bool]]:
    """Decode prompt and answer of a run together, because decoders strip a leading space."""
    if not run:
        return []
    ids, learned = zip(*run, strict=True)
    cut = learned.index(True) if True in learned else len(ids)
    assert all(learned[cut:])
    whole = pair.fast.decode(ids)
    head = pair.fast.decode(ids[:cut]) if cut < len(ids) else whole
    assert whole.startswith(head)
    return [part for part in ((head, False), (whole[len(head) :], True)) if part[0]]


def encoded(conversations: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> list[Example]:
    """The last row of each conversation, which contains all of it."""
    return [made[-1] for made in encoding.encode_rows(conversations, tokenizer)]


def failures(pair: Pair, tried: Iterable[Dialogue], encode_many: Encode | None = None) -> list[_Failure]:
    """List each problem with its conversation."""
    oracle, rng, encode_many = Oracle.of(pair), random.Random(0), encode_many or encoded
    harmless: dict[str, list[int]] = {}
    found: list[_Failure] = []
    for batch in batched(tried, 500):
        conversations = [dialogue.conversation for dialogue in batch]
        others = encode_many(conversations, pair.gguf)
        unknown = {key: dialogue.harmless for dialogue in batch if (key := str(dialogue.harmless)) not in harmless}
        for key, example in zip(unknown, encode_many(unknown.values(), pair.fast), strict=True):
            harmless[key] = [i for i in example["input_ids"] if i in oracle.names]
        for dialogue, example, other in zip(batch, encode_many(conversations, pair.fast), others, strict=True):
            wrong = _wrong(oracle, dialogue, example, rng) | {
                "llama.cpp has other ids": example != other,
                "a special token came from a text": harmless[str(dialogue.harmless)]
                != [i for i in example["input_ids"] if i in oracle.names],
            }
            found += [(what, dialogue.conversation) for what, is_wrong in wrong.items() if is_wrong]
    return found


def _wrong(oracle: Oracle, dialogue: Dialogue, example: Example, rng: random.Random) -> dict[str, bool]:
    """Also ask both tokenizers for the prompt of one answer."""
    pair, ids = oracle.pair, example["input_ids"]
    turns = oracle.learned_turns(dialogue)
    number, asked = rng.randrange(len(turns)), rng.choice((pair.fast, pair.gguf))
    turn = turns[number]
    prompt = encoding.encode(dialogue.messages[:turn], asked, tools=dialogue.tools, add_generation_prompt=True)
    text, learned = spelled(example, oracle)
    wanted_text = oracle.marked(dialogue, len(dialogue.messages))
    wanted_ids, answer = oracle.ids(dialogue, wanted_text), oracle.answer(dialogue, turn, wanted_text)
    if pair.fast.is_nfc:
        wanted_text, answer = unicodedata.normalize("NFC", wanted_text), unicodedata.normalize("NFC", answer)
    if pair.is_sentencepiece:  # its decoder reads the piece for a space as a space
        wanted_text, answer = wanted_text.replace("▁", " "), answer.replace("▁", " ")
    is_learned = len(learned) == len(turns) and learned[number] == answer
    return {
        "a prompt is not the beginning": prompt["input_ids"] != ids[: len(prompt["input_ids"])],
        "the ids read otherwise than the template": text != wanted_text,
        "the vocabulary's own library has other ids": wanted_ids is not None and ids != wanted_ids,
        "other words than the assistant's are learned": not is_learned,
        "a prompt is learned": set(prompt["labels"]) != {IGNORE_INDEX},
    }


@pytest.mark.parametrize("count", COUNTS)
def test_all_backends_give_dialogues_the_same_ids_and_no_special_tokens_from_texts(pair, count, request):
    seed = list(CASES).index(request.node.callspec.params["pair"])
    tried = dialogues(count, seed=seed, has_tools=True)
    assert failures(pair, tried)[:3] == []


def test_every_special_token_in_a_text_stays_text_in_any_place_and_in_pieces(pair):
    special = set(pair.fast.special_tokens.values())
    conversations = [
        {"messages": [{"role": "user", "content": first}, {"role": "assistant", "content": second}]}
        for token in {*SPECIAL, *list(pair.fast.special_tokens)[:40]}
        for first, second in [(token, token), *((token[:cut], token[cut:]) for cut in range(1, len(token)))]
    ]
    found = encoded(conversations, pair.fast)
    counts = {len([i for i in example["input_ids"] if i in special]) for example in found}
    assert len(counts) == 1
    assert found == encoded(conversations, pair.gguf)


def in_place(conversations: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> list[Example]:
    """As most programs do it: render the texts into the template and parse every special token."""
    special = sorted(tokenizer.special_tokens, key=len, reverse=True)
    splitter = re.compile("(" + "|".join(map(re.escape, filter(None, special))) + ")")
    examples = []
    for conversation in conversations:
        text = render_jinja_template(
            [conversation["messages"]], conversation.get("tools"), None, tokenizer.chat_template, **tokenizer.variables
        )[0][0]
        ids = [
            i
            for part in filter(None, splitter.split(text))
            for i in (
                [tokenizer.special_tokens[part]] if part in tokenizer.special_tokens else tokenizer.encode_text(part)
            )
        ]
        examples.append({"input_ids": ids, "labels": ids})
    return examples


def without_one_id(conversations: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> list[Example]:
    """Leave out the second id."""
    examples = encoded(conversations, tokenizer)
    return [{name: [ids[0], *ids[2:]] for name, ids in example.items()} for example in examples]


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        (in_place, "a special token came from a text"),
        (in_place, "other words than the assistant's are learned"),
        (without_one_id, "the ids read otherwise than the template"),
    ],
)
def test_the_check_detects_a_broken_encoding(pair, broken, wrong):
    tried = list(dialogues(60, seed=1, has_tools=True, ordinary=0))
    assert wrong in {what for what, _ in failures(pair, tried, broken)}


@pytest.mark.parametrize("pair", ["smollm2-hermes_tools", "qwen_tokens-hermes_tools"], indirect=True)
def test_trained_tokens_are_those_in_the_assistant_mask_of_transformers(pair):
    assert "{%- generation %}" in pair.fast.chat_template
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(pair.tokenizer_dir / "tokenizer.json"),
        chat_template=pair.fast.chat_template,
        **pair.fast.variables,
    )
    for dialogue in dialogues(300, seed=2, has_tools=True, ordinary=1):
        has_blank = any(dialogue.messages[turn]["content"][:1].isspace() for turn in dialogue.turns)
        if has_blank or dialogue.seen != dialogue.messages:
            continue  # those have their own ids, or answers that transformers would train
        example = encoding.encode(dialogue.messages, pair.fast, tools=dialogue.tools)
        marked = theirs.apply_chat_template(
            dialogue.messages, tools=dialogue.tools, return_assistant_tokens_mask=True, return_dict=True
        )
        assert example["input_ids"] == marked["input_ids"]
        assert [int(label != IGNORE_INDEX) for label in example["labels"]] == marked["assistant_masks"]


@pytest.mark.parametrize(
    "pair",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("llama3-llama3", "qwen2-hermes_tools")],
    indirect=True,
)
def test_a_real_vocabulary_gives_the_ids_that_llama_cpps_own_tests_expect(pair, converter):
    make, _ = CASES[pair.tokenizer_dir.name]
    for text, ids in vocabularies.expected_ids(converter, make):
        assert pair.fast.encode_text(text) == pair.gguf.encode_text(text) == ids


def test_nemo_tokenises_words_like_mistrals_own_tokenizer():
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken comes with mistral-common")
    file = vocabularies.mistral_file("tekken_240718.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    config, count = content["config"], content["config"]["default_num_special_tokens"]
    words = content["vocab"][: config["default_vocab_size"] - count]
    ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}
    theirs = tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    ours = FastTokenizer(vocabularies.from_tekken(file), vocabularies.SAIGA_NEMO, {})
    texts = [
        message["content"] for dialogue in dialogues(2000, seed=3, has_tools=False) for message in dialogue.messages
    ]
    theirs_ids = [[i + count for i in theirs.encode_ordinary(text)] for text in texts]
    assert [text for text, ids in zip(texts, theirs_ids, strict=True) if ours.encode_text(text) != ids] == []


@pytest.mark.parametrize("pair", ["nemo-saiga_nemo"], indirect=True)
def test_llama_cpp_splits_nemos_words_differently_only_around_combining_marks(pair):
    """Its pattern has no \\p{M}, so "кто́-то" gets other ids; our GGUFs carry their tokenizer.json for this."""

    def differs(text: str) -> bool:
        return pair.gguf._llm.tokenize(text.encode("utf-8"), add_bos=False, special=False) != pair.fast.encode_text(
            text
        )

    texts = [
        message["content"] for dialogue in dialogues(700, seed=4, has_tools=False) for message in dialogue.messages
    ]
    plain = [text for text in texts if not any(unicodedata.category(character)[0] == "M" for character in text)]
    assert len(plain) > 1000
    assert [text for text in plain if differs(text)] == []
    assert differs("кто́-то")
    assert pair.gguf.encode_text("кто́-то") == pair.fast.encode_text("кто́-то")


def test_both_backends_decode_ids_alike_including_the_longest_tokens(pair):
    special = set(pair.fast.special_tokens.values())
    size = pair.gguf._llm.n_vocab()
    longest = sorted(range(size), key=lambda i: -len(pair.fast.decode([i])))[:100]
    samples = [[i] for i in longest if i not in special]
    samples += [pair.fast.encode_text(each.messages[0]["content"]) for each in dialogues(300, seed=5, has_tools=False)]
    assert [ids for ids in samples if pair.fast.decode(ids) != pair.gguf.decode(ids)] == []


@pytest.mark.parametrize(
    ("pair", "token"), [("llama2-saiga2", "</s>"), ("smollm2-its_own", "<|im_end|>")], indirect=["pair"]
)
def test_without_placeholders_the_check_detects_special_tokens_from_texts(pair, token, monkeypatch):
    messages = [{"role": "user", "content": f"Привет {token} мир"}, {"role": "assistant", "content": "Да"}]
    harmless = [{"role": "user", "content": "слово"}, {"role": "assistant", "content": "слово"}]
    tried = [Dialogue({"messages": messages}, {"messages": harmless}, is_ordinary=False)]
    assert failures(pair, tried) == []
    monkeypatch.setattr(placeholders._Masker, "placeholder", lambda self, text, path: text)
    monkeypatch.setattr(layout, "_is_plain", lambda messages, tools: False)
    assert "a special token came from a text" in {what for what, _ in failures(pair, tried)}


@pytest.mark.parametrize("pair", ["llama2-saiga2"], indirect=True)
def test_a_filler_that_inserts_the_wrong_text_is_detected(pair, monkeypatch):
    monkeypatch.setattr(placeholders._Rendered, "fill", lambda self, texts: texts[0])
    with pytest.raises(SaigaError, match="changes contents beyond trimming"):
        encoded([each.conversation for each in dialogues(20, seed=1, has_tools=True)], pair.fast)


def test_llama_cpp_gives_back_the_text_of_every_token(pair):
    tokens = gguf.GGUFReader(pair.tokenizer_dir / "vocabulary.gguf").fields["tokenizer.ggml.tokens"]
    written = "\0".join(bytes(tokens.parts[index]).decode("utf-8") for index in tokens.data)
    assert vocabulary_sha256(pair.gguf._llm) == sha256_of_text(written)
