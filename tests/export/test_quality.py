"""The measured cost of quantising, against the logits of transformers and of llama-cpp-python."""

import math
from contextlib import closing

import llama_cpp
import numpy as np
import pytest
import small_models
import torch
from transformers import AutoModelForCausalLM

from saigakit import export
from saigakit.errors import SaigaError
from saigakit.export import quality
from saigakit.prompt.encoding import IGNORE_INDEX

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
IDS = [[1, *np.random.default_rng(seed).integers(3, 768, size=size).tolist()] for seed, size in ((1, 40), (2, 300))]
ROWS = [{"input_ids": ids, "labels": [IGNORE_INDEX] * (len(ids) // 2) + ids[len(ids) // 2 :]} for ids in IDS]


@pytest.fixture(scope="module")
def base_dir(tiny, tmp_path_factory):
    return small_models.base(tmp_path_factory.mktemp("model") / "base", tiny / "base", **SHAPE)


@pytest.fixture(scope="module")
def files(base_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    return {
        name: export.to_gguf(model=str(base_dir), adapter=None, output=directory / name, quant_type=name)
        for name in ("F32", "Q8_0", "Q4_0", "Q2_K")
    }


def logits_of(file, ids):
    """With llama-cpp-python's own class."""
    with closing(llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False)) as llm:
        llm.eval(ids)
        return torch.tensor(llm.scores[: len(ids)]).double()


def test_a_file_against_itself_costs_nothing(files, base_dir):
    found = quality.compare_files(files["F32"], files["F32"], ROWS)
    assert (found.divergence, found.same_top) == (0.0, 1.0)
    assert found.perplexity == found.reference_perplexity


def test_the_perplexity_equals_that_of_transformers_on_the_trained_tokens(files, base_dir):
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    loss = 0.0
    with torch.no_grad():
        for row in ROWS:
            logits, labels = model(torch.tensor([row["input_ids"]])).logits[0], torch.tensor(row["labels"])
            loss += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
    found = quality.compare_files(files["F32"], files["F32"], ROWS)
    assert found.tokens == sum(label != IGNORE_INDEX for row in ROWS for label in row["labels"])
    assert found.perplexity == pytest.approx(math.exp(loss / found.tokens), rel=2e-3)


def test_divergence_and_top_tokens_equal_those_from_all_logits_at_once(files):
    divergences, tops = [], []
    for row in ROWS:
        is_trained = torch.tensor(row["labels"])[1:] != IGNORE_INDEX
        first, second = (
            logits_of(files[name], row["input_ids"])[:-1][is_trained].log_softmax(-1) for name in ("F32", "Q4_0")
        )
        divergences += (first.exp() * (first - second)).sum(-1).tolist()
        tops += (first.argmax(-1) == second.argmax(-1)).tolist()
    found = quality.compare_files(files["F32"], files["Q4_0"], ROWS)
    assert found.divergence == pytest.approx(np.mean(divergences), rel=0.02)
    assert found.same_top == pytest.approx(np.mean(tops), abs=0.02)


def test_fewer_bits_cost_more(files):
    found = [quality.compare_files(files["F32"], files[name], ROWS) for name in ("Q8_0", "Q4_0", "Q2_K")]
    assert 0 < found[0].divergence < found[1].divergence < found[2].divergence
    assert 1 > found[0].same_top > found[1].same_top > found[2].same_top


def test_labels_equal_to_the_ids_compare_every_token_but_the_first(files):
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    assert quality.compare_files(files["F32"], files["F32"], rows).tokens == sum(map(len, IDS)) - 2


def test_it_stops_after_max_tokens(files):
    assert quality.compare_files(files["F32"], files["F32"], ROWS, max_tokens=1).tokens == 21


def test_a_different_vocabulary_is_refused(files, tiny, tmp_path):
    base = small_models.base(tmp_path / "base", tiny / "base", vocab_size=800)
    other = export.to_gguf(model=str(base), adapter=None, output=tmp_path / "other.gguf", quant_type="F16")
    with pytest.raises(SaigaError, match=r"vocabulary of 800 tokens and .* one of 768"):
        quality.compare_files(files["F32"], other, ROWS)


def test_rows_without_trained_tokens_are_refused(files):
    rows = [{"input_ids": IDS[0], "labels": [IGNORE_INDEX] * len(IDS[0])}]
    with pytest.raises(SaigaError, match="no trained tokens"):
        quality.compare_files(files["F32"], files["Q8_0"], rows)


def test_a_damaged_file_is_refused(files, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(files["Q8_0"].read_bytes()[:5000])
    with pytest.raises(SaigaError, match=r"cannot load .*cut\.gguf: .*failed to read key-value pairs"):
        quality.compare_files(files["F32"], tmp_path / "cut.gguf", ROWS)


def test_the_table_has_a_row_for_each_type():
    measured = quality.Quality(1234, 2.2, 2.0, 0.0512, 0.951)._asdict()
    content = {"reference": "F16", "bytes": {"Q4_0": 1_230_000_000}, "types": {"Q4_0": measured}}
    (row,) = quality.quality_table(content).rows
    assert row[1:] == ("1.23", "2.200", "+10.0", "0.0512", "95.1")
    assert "1,234" in quality.quality_table(content).note
