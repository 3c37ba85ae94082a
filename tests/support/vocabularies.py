"""Load real vocabularies as the tokenizer of training and as llama.cpp's, from a GGUF with nothing else."""

import base64
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import llama_cpp_chain
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from saigakit.llamacpp import streaming, vocabulary
from saigakit.llamacpp.vocabulary import Vocabulary
from saigakit.prompt import encoding, template
from saigakit.prompt.encoding import FastTokenizer, GgufTokenizer
from saigakit.registry import MODELS

LLAMA2 = Path(__file__).parents[3] / "shared" / "tokenizers" / "llama-2.model"
_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# SmolLM2's vocabulary with the special tokens and the pre-tokenizer of models that no package contains: its tokens of
# ids 0 to 8 are renamed. Those that Qwen does not flag as special are not flagged here either.
_LLAMA3 = ("<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
# Without the class transformers 5.0 adds the tokens of Code Llama.
_LLAMA3_NAMED = {"bos_token": _LLAMA3[1], "eos_token": _LLAMA3[2], "tokenizer_class": "PreTrainedTokenizerFast"}
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

SAIGA2 = template.read_chat_template(MODELS["saiga2_7b"], Path())
SAIGA_NEMO = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}
    {%- elif message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}
    {%- else %}{{ message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
MISTRAL_TOOLS = r"""
{{- bos_token }}
{%- if tools %}
    {{- '[AVAILABLE_TOOLS] [' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- '' if loop.last else ', ' }}{%- endfor %}
    {{- '][/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}{{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson }}
        {%- if message.tool_call_id %}{{- ', "call_id": "' + message.tool_call_id + '"' }}{%- endif %}
        {{- '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- message.content }}
        {%- if message.tool_calls %}
            {{- '[TOOL_CALLS] [' }}
            {%- for call in message.tool_calls %}
                {%- set out = call.function | tojson %}
                {{- out[:-1] + (', "id": "' + call.id + '"}' if call.id else '}') + ('' if loop.last else ', ') }}
            {%- endfor %}
            {{- ']' }}
        {%- endif %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}"""
HERMES_TOOLS = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\n' + (system + '\n\n' if system else '') + '# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools>\n\nCall as <tool_call>\n{"name": …, "arguments": …}\n</tool_call><|im_end|>\n' }}
{%- elif system %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# The answer that ends a conversation gets an empty thought; earlier ones have none.
THINKING = (
    HERMES_TOOLS.replace("{%- generation %}", "", 1)
    .replace("{%- endgeneration %}", "", 1)
    .replace(
        "{{- message.content }}",
        "{{- ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + message.content }}",
        1,
    )
)
# The prompt opens the thought, and the answer starts between two newlines.
THINKING_PROMPT = THINKING.replace(
    "{{- '<|im_start|>assistant\\n' }}{%- endif %}", "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
assert HERMES_TOOLS != THINKING != THINKING_PROMPT
# Gemma's turns with a system turn, which Saiga's Gemma has and stock Gemma lacks.
GEMMA = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
# The system prompt goes into the first turn of the user, as in stock Gemma and in Mistral's first formats.
FOLDED_SYSTEM = r"""
{{- bos_token }}
{%- set has_system = messages[0]['role'] == 'system' %}
{%- for message in (messages[1:] if has_system else messages) %}
    {%- set before = messages[0]['content'] | trim + '\n\n' if has_system and loop.first else '' %}
    {%- set role = 'model' if message['role'] == 'assistant' else 'user' %}
    {{- '<start_of_turn>' + role + '\n' + before + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
LLAMA3 = r"""
{%- for message in messages %}
    {%- set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
    {%- set content = header + message['content'] | trim + '<|eot_id|>' %}
    {{- bos_token + content if loop.first else content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A vocabulary with a chat template: the tokenizer of training, llama.cpp's, and the vocabulary's own library."""

    fast: FastTokenizer
    gguf: GgufTokenizer
    own: Callable[[str], list[int]]  # token ids from sentencepiece, or from tokenizer.json with its added tokens
    is_sentencepiece: bool
    is_split: bool  # the final answer is rendered differently
    always_found: Sequence[str]  # pieces that sentencepiece, unlike llama.cpp, finds in any text
    tokenizer_dir: Path


def _from_model(file: Path, directory: Path) -> None:
    if not file.is_file():
        pytest.skip(f"the vocabulary is not at {file}")
    (directory / "tokenizer.model").write_bytes(file.read_bytes())
    _write(directory / "tokenizer_config.json", _NAMED)


def llama2(directory: Path, _: Path | None) -> None:
    _from_model(LLAMA2, directory)


def mistral_v1(directory: Path, _: Path | None) -> None:
    _from_model(mistral_file("tokenizer.model.v1"), directory)


def mistral_v3(directory: Path, _: Path | None) -> None:
    _from_model(mistral_file("mistral_instruct_tokenizer_240323.model.v3"), directory)


def nemo(directory: Path, _: Path | None) -> None:
    from_tekken(mistral_file("tekken_240718.json")).save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", {**_NAMED, "pad_token": "<pad>"})


def smollm2(directory: Path, source: Path | None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())


def llama3_tokens(directory: Path, source: Path | None) -> None:
    _renamed(directory, source, "llama-bpe", special=_LLAMA3)
    _write(directory / "tokenizer_config.json", _LLAMA3_NAMED)


def qwen_tokens(directory: Path, source: Path | None) -> None:
    _renamed(directory, source, "qwen2", special=_QWEN, plain=_QWEN_PLAIN)
    _write(directory / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


def gemma_tokens(directory: Path, source: Path | None) -> None:
    _renamed(directory, source, "llama-bpe", special=_GEMMA)
    _write(directory / "tokenizer_config.json", {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})


def llama3(directory: Path, source: Path | None) -> None:
    _from_gguf(directory, source, "llama-bpe", bos=_LLAMA3[1])
    _write(directory / "tokenizer_config.json", _LLAMA3_NAMED)


def qwen2(directory: Path, source: Path | None) -> None:
    _from_gguf(directory, source, "qwen2")
    _write(directory / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


def _from_gguf(directory: Path, source: Path, pre: str, bos: str | None = None) -> None:
    """A tokenizer.json with the words of a vocabulary that llama.cpp's source has for its own tests."""
    metadata = llama_cpp_chain.File.of(source / "models" / f"ggml-vocab-{pre}.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == pre
    texts, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if "[PAD" in texts[-1]:  # the rows of the embeddings without a token
        texts = texts[: next(i for i, text in enumerate(texts) if text.startswith("[PAD"))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {vocabulary.CONTROL: True, vocabulary.USER_DEFINED: False}
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, texts.index(bos))])
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] = {text: i for i, text in enumerate(texts)}
    content["model"]["merges"] = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    content["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    content["added_tokens"] = [
        {"id": i, "content": text, "special": special[kind], **flags}
        for i, (text, kind) in enumerate(zip(texts, types, strict=False))
        if kind in special
    ]
    _write(directory / "tokenizer.json", content)


def expected_ids(source: Path, make: Callable[[Path, Path | None], None]) -> list[tuple[str, list[int]]]:
    """The texts of llama.cpp's own tests with their ids, which the model's own tokenizer has made."""
    file = source / "models" / {llama3: "ggml-vocab-llama-bpe.gguf", qwen2: "ggml-vocab-qwen2.gguf"}[make]
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text(encoding="utf-8").split("\n")
    assert 40 < len(texts) <= len(lines)
    return [(text, [*map(int, line.split())]) for text, line in zip(texts, lines, strict=False)]


# Each vocabulary with the templates whose special tokens it has.
CASES = {
    "llama2-saiga2": (llama2, SAIGA2),
    "mistral_v1-saiga2": (mistral_v1, SAIGA2),
    "mistral_v3-saiga2": (mistral_v3, SAIGA2),
    "mistral_v3-tools": (mistral_v3, MISTRAL_TOOLS),
    "nemo-saiga_nemo": (nemo, SAIGA_NEMO),
    "nemo-tools": (nemo, MISTRAL_TOOLS),
    "smollm2-its_own": (smollm2, None),
    "smollm2-hermes_tools": (smollm2, HERMES_TOOLS),
    "llama3_tokens-llama3": (llama3_tokens, LLAMA3),
    "qwen_tokens-hermes_tools": (qwen_tokens, HERMES_TOOLS),
    "qwen_tokens-thinking": (qwen_tokens, THINKING),
    "qwen_tokens-thinking_prompt": (qwen_tokens, THINKING_PROMPT),
    "llama3-llama3": (llama3, LLAMA3),
    "qwen2-hermes_tools": (qwen2, HERMES_TOOLS),
    "gemma_tokens-saiga_gemma": (gemma_tokens, GEMMA),
    "gemma_tokens-folded_system": (gemma_tokens, FOLDED_SYSTEM),
}


def source_fixture(make: Callable[[Path, Path | None], None]) -> str | None:
    """The fixture with the directory that `make` reads."""
    if make in (llama3, qwen2):
        return "converter"
    return "smollm2" if make in (smollm2, llama3_tokens, qwen_tokens, gemma_tokens) else None


def pair(case: str, directory: Path, source: Path | None = None) -> Pair:
    """Create `case` of CASES in `directory`; skips the test if the vocabulary is not available."""
    make, chat_template = CASES[case]
    made = directory / case
    made.mkdir()
    make(made, source)
    if chat_template is None:
        chat_template = (source / "chat_template.jinja").read_text(encoding="utf-8")
    (made / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    _write(made / "config.json", {})
    fast = encoding.load_tokenizer(str(made))
    llm = llama_cpp.Llama(str(gguf_file(made, fast)), vocab_only=True, n_ctx=512, verbose=False)
    llm._model.n_ctx_train = lambda: 4096  # 0 without weights, and then each text is tokenised twice
    return Pair(
        fast=fast,
        gguf=encoding.load_gguf_tokenizer(llm),
        own=_own(made),
        is_sentencepiece=(made / "tokenizer.model").is_file(),
        is_split=chat_template in (THINKING, THINKING_PROMPT),
        always_found=["[REFERENCE_DOC_"] if make is mistral_v3 else [],
        tokenizer_dir=made,
    )


def gguf_file(tokenizer_dir: Path, tokenizer: FastTokenizer) -> Path:
    """A GGUF with only the vocabulary, as 03_merge_gguf writes it."""
    file = tokenizer_dir / "vocabulary.gguf"
    size = max(tokenizer._text_only.get_vocab_size(), *[i + 1 for i in tokenizer.special_tokens.values()])
    found = Vocabulary.from_tokenizer(tokenizer_dir, tokenizer, {"vocab_size": size})
    writer = gguf.GGUFWriter(file, "llama")
    for add in (writer.add_block_count, writer.add_embedding_length, writer.add_feed_forward_length):
        add(1)
    writer.add_context_length(512)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    found.write_metadata(writer)
    writer.add_chat_template(template.for_inference(tokenizer.chat_template))
    streaming.write_header(writer, {}, {})
    return file


def _own(directory: Path) -> Callable[[str], list[int]]:
    if (directory / "tokenizer.model").is_file():
        return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).encode
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def mistral_file(name: str) -> Path:
    """A vocabulary file of the package mistral-common, which is not imported."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("the package mistral-common, which holds Mistral's vocabularies, is not installed")
    file = Path(found.origin).parent / "data" / name
    if not file.is_file():
        pytest.skip(f"this version of mistral-common has no {name}")
    return file


@cache
def from_tekken(file: Path) -> Tokenizer:
    """Like transformers: special tokens first, then the words by rank."""
    content = json.loads(file.read_text(encoding="utf-8"))
    config = content["config"]
    count = config["default_num_special_tokens"]
    special = [*_TEKKEN_SPECIAL, *(f"<SPECIAL_{i}>" for i in range(len(_TEKKEN_SPECIAL), count))]
    words = content["vocab"][: config["default_vocab_size"] - count]
    characters = _characters()
    spelled = ["".join(characters[byte] for byte in base64.b64decode(word["token_bytes"])) for word in words]
    known = {text: rank for rank, text in enumerate(spelled)}
    merges: list[tuple[str, str]] = []
    for text in spelled:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in known and text[cut:] in known]
        merges += sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
    ids = {text: i for i, text in enumerate(special)} | {text: rank + count for text, rank in known.items()}
    tokenizer = Tokenizer(models.BPE(ids, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, _byte_level()])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return tokenizer


# tekken_240718.json names none; mistral-common gives these to such files, followed by <SPECIAL_20> and so on.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def _splitter(pre: str) -> pre_tokenizers.Sequence:
    pattern = next(steps[0] for steps, name in vocabulary._PRE_TOKENIZERS.items() if name == pre)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level()])


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _characters() -> list[str]:
    """GPT-2's character for each byte."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def _renamed(
    directory: Path, source: Path | None, pre: str, *, special: Sequence[str], plain: Sequence[str] = ()
) -> None:
    content: dict[str, Any] = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    for token, text in zip(content["added_tokens"], (*special, *plain), strict=False):
        del words[token["content"]]
        words[text] = token["id"]
        token |= {"content": text, "special": text in special}
    content["pre_tokenizer"] = json.loads(_splitter(pre).__getstate__())
    content["model"]["ignore_merges"] = pre == "llama-bpe"  # as in the files of Llama 3 and of Qwen
    content["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    _write(directory / "tokenizer.json", content)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
