"""Make the tiny Saiga: base, adapter, tokenizer and records in less than a megabyte."""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SYSTEM = "Выпиши из текста термины и определения в виде JSON."
DEFINITIONS = (
    ("атом", "мельчайшая частица элемента"),
    ("байт", "восемь двоичных разрядов"),
    ("вектор", "отрезок с направлением"),
    ("график", "линия зависимости двух величин"),
    ("дельта", "разность двух значений"),
    ("ёмкость", "наибольший объём содержимого"),
    ("журнал", "запись событий по порядку"),
    ("зонд", "прибор для измерений на расстоянии"),
    ("индекс", "номер элемента в списке"),
    ("ключ", "имя значения в словаре"),
    ("линза", "прозрачное тело с кривой поверхностью"),
    ("масса", "мера инертности тела"),
    ("норма", "длина вектора"),
    ("орбита", "путь тела вокруг другого тела"),
    ("порт", "номер входа в программу по сети"),
    ("радиус", "расстояние от центра до окружности"),
    ("стек", "список с одним открытым концом"),
    ("тест", "проверка одного свойства программы"),
    ("узел", "место соединения частей"),
    ("файл", "именованная запись на диске"),
    ("хеш", "короткий отпечаток данных"),
    ("цикл", "повторение одних и тех же действий"),
    ("частота", "число колебаний в секунду"),
    ("шум", "случайная помеха сигналу"),
    ("щуп", "пластина для измерения зазора"),
    ("экран", "поверхность для изображения"),
    ("юнга", "ученик матроса на корабле"),
    ("якорь", "груз, который держит судно"),
    ("буфер", "память для временных данных"),
    ("веха", "шест для отметки места"),
    ("грань", "плоская сторона тела"),
    ("диск", "круглый носитель данных"),
    ("звено", "одно кольцо цепи"),
    ("ион", "атом с зарядом"),
    ("кадр", "одно изображение фильма"),
    ("лента", "длинная узкая полоса"),
    ("модуль", "часть программы с одной задачей"),
    ("ось", "прямая, вокруг которой вращаются"),
    ("поток", "движение в одну сторону"),
    ("рычаг", "стержень с точкой опоры"),
    ("сеть", "узлы и связи между ними"),
    ("точка", "место без размера"),
    ("угол", "поворот от луча к лучу"),
    ("фаза", "положение внутри периода"),
    ("шаг", "расстояние между соседними точками"),
)
NOTHING_DEFINED = (
    "Утром мы открыли окно и долго слушали дождь.",
    "Таблица на второй странице набрана мелко.",
    "Сборка прошла с третьего раза.",
    "Отчёт сдали в пятницу, к обеду.",
    "Он записал номер и положил трубку.",
    "Поезд опоздал на сорок минут.",
    "В новой версии исправлены две ошибки.",
    "Чай остыл, а письмо так и не дописано.",
    "Сервер перезапустили ночью.",
    "Мы сравнили оба ответа и выбрали короткий.",
    "Кошка спит на тёплом блоке питания.",
    "Лампу заменили, ключи лежат у вахтёра.",
    "Лекцию перенесли в другую аудиторию.",
    "Расчёт занял почти три часа.",
    "Снег растаял ещё до праздника.",
)
PHRASINGS = ("{T} — это {d}.", "{T}: {d}.", "Словом «{t}» называют: {d}.")


def records() -> list[dict[str, str]]:
    """60 records in a fixed order; every fourth text defines nothing and has the answer `[]`."""
    rows = []
    for index, (term, definition) in enumerate(DEFINITIONS):
        text = PHRASINGS[index % len(PHRASINGS)].format(T=term.capitalize(), t=term, d=definition)
        rows.append(_record(text, [{"term": term, "definition": definition}]))
        if index % 3 == 2:
            rows.append(_record(NOTHING_DEFINED[index // 3], []))
    return rows


def _record(text: str, answer: list[dict[str, str]]) -> dict[str, str]:
    return {"system": SYSTEM, "user": text, "bot": json.dumps(answer, ensure_ascii=False)}


VOCABULARY_SIZE = 768  # a multiple of 32, like every dimension of the tiny model, because of ggml's blocks
SPACE = "▁"
# Pieces of the vocabulary with and without a leading space, so that a loader that drops it gets other ids.
ROLES = ("system", "user", "bot")
_LETTERS = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
_LATIN = "abcdefghijklmnopqrstuvwxyz"
_SIGNS = "0123456789.,:;!?-–—()[]{}<>«»„“\"'/\\|_+=*&%$#@^~`№"
ALPHABET = _LETTERS + _LETTERS.upper() + _LATIN + _LATIN.upper() + _SIGNS
_LAST = -1e9  # score of whitespace-only pieces in Llama's model, which merge last


def sentencepiece_model(texts: Iterable[str]) -> bytes:
    """A serialised ModelProto; the same texts give the same bytes."""
    from sentencepiece import sentencepiece_model_pb2

    spm: Any = sentencepiece_model_pb2  # protobuf creates its classes at run time
    kind = spm.ModelProto.SentencePiece
    pieces = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    spaces = [(SPACE * length, _LAST, kind.NORMAL) for length in range(1, 17)]
    count = VOCABULARY_SIZE - len(pieces) - len(spaces) - len(ALPHABET)
    ranked = [*_merges(texts, count), *ALPHABET]
    pieces += [(piece, float(-rank), kind.NORMAL) for rank, piece in enumerate(ranked)]
    pieces += spaces
    model = spm.ModelProto()
    for piece, score, type_ in pieces:
        model.pieces.add(piece=piece, score=score, type=type_)
    trainer = model.trainer_spec
    trainer.model_type = spm.TrainerSpec.BPE
    trainer.vocab_size, trainer.byte_fallback, trainer.split_digits = len(pieces), True, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _merges(texts: Iterable[str], count: int) -> list[str]:
    """The first `count` merges of byte-pair encoding, in order."""
    frequency = Counter(SPACE + word for text in texts for word in text.split())
    frequency |= dict.fromkeys(ROLES, 2_000_000) | dict.fromkeys((SPACE + role for role in ROLES), 1_000_000)
    words = {word: list(word) for word in frequency}
    merges: list[str] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                if not any(character.isdigit() for character in "".join(pair)):
                    pairs[pair] += frequency[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append("".join(best))
        words = {word: _merged(parts, best) for word, parts in words.items()}
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 256, 2, 4, 2  # 256: the row length of k-quants
RANK, ALPHA = 4, 8
ATTENTION = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "v_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
}  # name -> (out, in)
MLP = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 1024,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": VOCABULARY_SIZE,
}
ADAPTER_CONFIG = {
    "base_model_name_or_path": "package:saiga_tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "revision": None,
    "target_modules": [*ATTENTION],
    "task_type": "CAUSAL_LM",
}
# As in the repositories of the released adapters: no `legacy`, no tokenizer.json.
TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 1024,
    "pad_token": "<unk>",
    "padding_side": "left",
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "sep_token": "<s>",
    "unk_token": "<unk>",
}
GENERATION_CONFIG = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_new_tokens": 256,
    "no_repeat_ngram_size": 15,
    "pad_token_id": 0,
    "repetition_penalty": 1.1,
    "temperature": 0.2,
    "top_k": 40,
    "top_p": 0.9,
}


def make(directory: Path) -> Path:
    """Write base/, adapter/ and records.jsonl into `directory`."""
    import torch
    from safetensors.torch import save_file

    base, adapter = directory / "base", directory / "adapter"
    rows = records()
    vocabulary = sentencepiece_model(text for row in rows for text in row.values())
    for folder in (base, adapter):
        folder.mkdir(parents=True)
        (folder / "tokenizer.model").write_bytes(vocabulary)
        _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
        _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    generator = torch.Generator().manual_seed(1337)
    _write_json(base / "config.json", CONFIG)
    save_file(base_weights(generator), base / "model.safetensors", metadata={"format": "pt"})
    _write_json(adapter / "adapter_config.json", ADAPTER_CONFIG)
    torch.save(adapter_weights(generator), adapter / "adapter_model.bin")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / "records.jsonl").write_text(lines, encoding="utf-8")
    return directory


def base_weights(generator: "torch.Generator") -> dict[str, "torch.Tensor"]:
    """Random float16 weights with outputs far from uniform and norms other than 1."""
    import torch

    def normal(*shape: int, std: float) -> "torch.Tensor":
        return (torch.randn(*shape, generator=generator) * std).to(torch.float16)

    def norm() -> "torch.Tensor":
        return (1 + 0.1 * torch.randn(HIDDEN, generator=generator)).to(torch.float16)

    weights = {"model.embed_tokens.weight": normal(VOCABULARY_SIZE, HIDDEN, std=1.0)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for block, matrices in (("self_attn", ATTENTION), ("mlp", MLP)):
            for name, shape in matrices.items():
                weights[f"{prefix}.{block}.{name}.weight"] = normal(*shape, std=1 / math.sqrt(shape[1]))
        weights[f"{prefix}.input_layernorm.weight"] = norm()
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm()
    weights["model.norm.weight"] = norm()
    weights["lm_head.weight"] = normal(VOCABULARY_SIZE, HIDDEN, std=2 / math.sqrt(HIDDEN))
    return weights


def adapter_weights(generator: "torch.Generator") -> dict[str, "torch.Tensor"]:
    """LoRA A and B in float32 with peft's keys of 2023; B is not zero, so that the adapter has an effect."""
    import torch

    weights: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for name, (out, into) in ATTENTION.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) / math.sqrt(into)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.2
    return weights


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m saigakit.demo.tiny_model DIRECTORY")
    print(make(Path(sys.argv[1])))
