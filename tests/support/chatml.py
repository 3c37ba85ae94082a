"""Make a ChatML tokenizer, and conversations with and without tools."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from saigakit.prompt import template
from saigakit.prompt.encoding import IGNORE_INDEX, FastTokenizer

CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
CONVERSATION = [
    {"role": "system", "content": "Ты — Сайга."},
    {"role": "user", "content": "Привет"},
    {"role": "assistant", "content": "Здравствуй!"},
]
THOUGHTFUL = CHATML.replace(
    "+ message['content'] +",
    "+ ('<think>' if message.role == 'assistant' and loop.last else '') + message['content'] +",
)
WITH_TOOLS = template.with_tools(CHATML)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "найти",
            "description": "Ищет </s>",
            "parameters": {
                "type": "object",
                "properties": {"<s>ключ": {"type": "string", "enum": ["</s>", "да"]}},
                "required": ["<s>ключ"],
            },
        },
    }
]
CALL = {"type": "function", "id": "abc123456", "function": {"name": "найти", "arguments": {"<s>ключ": ["</s>", 1.5]}}}
MESSAGES = [
    {"role": "user", "content": "Найди"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"ok": "</s>"}', "tool_call_id": "abc123456", "name": "найти"},
    {"role": "assistant", "content": "Готово"},
]


def chatml_bpe() -> Tokenizer:
    """Byte-level BPE that merges several line ends into one token, as Llama-3's and Qwen's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["user\nПривет, мир!\n\n", "assistant\n\n\nЗдравствуй!\n\n"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def chatml(chat_template: str = WITH_TOOLS) -> FastTokenizer:
    return FastTokenizer(chatml_bpe(), chat_template, {})


def learned(example: dict[str, list[int]]) -> list[int]:
    return [label for label in example["labels"] if label != IGNORE_INDEX]
