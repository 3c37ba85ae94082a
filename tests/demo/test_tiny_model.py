"""The tiny Saiga is reproducible and works with the real libraries."""

import json
import time
from pathlib import Path

import pytest
import sentencepiece
from tiny_vocabulary import sentencepiece_model

from saigakit.core import manifest
from saigakit.demo import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def vocabulary(tiny) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tiny / "base" / "tokenizer.model"))


def test_it_takes_seconds_and_less_than_a_megabyte(tmp_path):
    start = time.process_time()
    made = tiny_model.make(tmp_path / "tiny")
    assert time.process_time() - start < 20
    assert sum(file.stat().st_size for file in made.rglob("*") if file.is_file()) < 1_000_000


def test_it_has_the_same_bytes_every_time(tiny, tmp_path):
    assert manifest.hashes(tiny_model.make(tmp_path / "again")) == manifest.hashes(tiny)


def test_base_and_adapter_share_a_tokenizer_in_the_format_of_2023(tiny):
    base, adapter = (manifest.hashes(tiny / name) for name in ("base", "adapter"))
    assert base["tokenizer.model"] == adapter["tokenizer.model"]
    assert "tokenizer.json" not in base
    assert "legacy" not in json.loads((tiny / "base" / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_its_vocabulary_is_the_one_made_from_its_records(tiny, vocabulary):
    rows = [json.loads(line) for line in (tiny / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    made = sentencepiece_model((text for row in rows for text in row.values()), vocabulary.vocab_size())
    assert made == (tiny / "base" / "tokenizer.model").read_bytes()


def test_every_role_is_one_piece_with_and_without_a_space(vocabulary):
    for role in ("system", "user", "bot"):
        assert vocabulary.encode(f"{role}\n", out_type=str) == [f"▁{role}", "<0x0A>"]
        assert not vocabulary.is_unknown(vocabulary.piece_to_id(role))


def test_any_text_survives_the_vocabulary(vocabulary):
    for text in ("Привет,  мир!", "    отступ\n\tтаб", "🙂 ₽ 漢字", "2e-4 и 007"):
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_whitespace_only_pieces_merge_last(vocabulary):
    assert vocabulary.encode("x   термин", out_type=str)[:3] == ["▁", "x", "▁▁"]


def test_a_quarter_of_the_records_define_nothing(tiny):
    rows = [json.loads(line) for line in (tiny / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 60
    assert sum(row["bot"] == "[]" for row in rows) == 15
    assert all(item["definition"] in row["user"] for row in rows for item in json.loads(row["bot"]))


def test_the_adapter_loads_in_peft_and_changes_the_logits(tiny, vocabulary):
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, *vocabulary.encode("bot\n")]])
    base = AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.float32)
    before = base(ids).logits
    tuned = PeftModel.from_pretrained(base, tiny / "adapter")
    after = tuned(ids).logits
    assert base.config.vocab_size == vocabulary.vocab_size()
    assert (after - before).abs().max() > 0.5
