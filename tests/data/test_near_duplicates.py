"""Find deliberately edited texts, but none that only share a form."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import russian_texts
from russian_texts import EDITS, INSTRUCTION, letter, sentence, story

from saigakit.data import near_duplicates

COUNT = 200
SEEDS = (0, 1, 2)
KINDS = pytest.mark.parametrize("kind", [story, letter], ids=lambda kind: kind.__name__)
ALL_SEEDS = pytest.mark.parametrize("seed", SEEDS)


def signatures(texts, common):
    signer = near_duplicates.Signer(common)
    for text in texts:
        signer.add(text)
    return signer.finish()


def signed(texts, among=None):
    return signatures(texts, near_duplicates.find_boilerplate(texts if among is None else among))


@ALL_SEEDS
@KINDS
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_finds_the_training_original_of_an_edited_evaluation_text(edit, kind, seed):
    rng = random.Random(seed)
    training = [kind(rng) for _ in range(COUNT)]
    held_out = [edit(text, rng) for text in training]
    near = near_duplicates.find_across(signed(held_out, training), signed(training))
    assert (near == np.arange(COUNT)).mean() >= 0.95


@ALL_SEEDS
@KINDS
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_finds_the_earlier_one_of_two_near_duplicates(edit, kind, seed):
    rng = random.Random(seed)
    originals = [kind(rng) for _ in range(COUNT)]
    texts = [*originals, *(edit(text, rng) for text in originals)]
    near = near_duplicates.find_within(signed(texts, originals))
    assert (near[COUNT:] == np.arange(COUNT)).mean() >= 0.95
    assert (near[:COUNT] == -1).mean() >= 0.99


@ALL_SEEDS
@KINDS
def test_new_texts_have_no_near_duplicates(kind, seed):
    rng = random.Random(seed)
    training, held_out = ([kind(rng) for _ in range(3 * COUNT)] for _ in range(2))
    assert (near_duplicates.find_within(signed(training)) >= 0).mean() <= 0.01
    assert (near_duplicates.find_across(signed(held_out, training), signed(training)) >= 0).mean() <= 0.01


def test_texts_that_share_half_of_their_sentences_are_not_near_duplicates():
    rng = random.Random(0)
    training, held_out = [], []
    for _ in range(COUNT):
        shared, *own = ([sentence(rng) for _ in range(6)] for _ in range(3))
        training.append(" ".join([*shared, *own[0]]))
        held_out.append(" ".join([*shared, *own[1]]))
    near = near_duplicates.find_across(*(signatures(side, frozenset()) for side in (held_out, training)))
    assert (near >= 0).mean() <= 0.01


def test_a_common_instruction_makes_no_near_duplicates():
    rng = random.Random(0)
    texts = [f"{INSTRUCTION} {sentence(rng)} {sentence(rng)}" for _ in range(COUNT)]
    assert (near_duplicates.find_within(signatures(texts, frozenset())) >= 0).mean() > 0.5
    assert (near_duplicates.find_within(signed(texts)) >= 0).mean() <= 0.01


def test_an_instruction_in_twelve_wordings_makes_no_near_duplicates():
    rng = random.Random(0)
    words = INSTRUCTION.split()
    wordings = [" ".join(rng.sample(words, len(words))) for _ in range(12)]
    texts = [f"{rng.choice(wordings)} {sentence(rng)} {sentence(rng)}" for _ in range(10 * COUNT)]
    assert (near_duplicates.find_within(signatures(texts, frozenset())) >= 0).mean() > 0.5
    assert (near_duplicates.find_within(signed(texts)) >= 0).mean() <= 0.01


def test_boilerplate_is_shared_by_more_than_a_fifth_and_at_least_ten():
    assert near_duplicates.find_boilerplate(["переведи слово"] * 10 + ["кот"] * 39) == {"переведи слово"}
    assert near_duplicates.find_boilerplate(["переведи слово"] * 9) == frozenset()
    assert near_duplicates.find_boilerplate(["переведи слово"] * 12 + ["кот"] * 48) == frozenset()
    assert near_duplicates.find_boilerplate(["переведи слово"] * 13 + ["кот"] * 47) == {"переведи слово"}
    assert near_duplicates.find_boilerplate(["переведи слово"] * 50 + ["кот"] * 950) == {"переведи слово"}


def test_only_a_thousand_texts_are_searched_for_boilerplate():
    texts = iter(["кот"] * near_duplicates.SAMPLE + ["переведи слово"] * 500)
    assert near_duplicates.find_boilerplate(texts) == frozenset()
    assert len(list(texts)) == 500


def test_an_edited_word_in_the_instruction_is_not_content():
    rng = random.Random(0)
    texts = [story(rng) for _ in range(COUNT)]
    common = near_duplicates.find_boilerplate(texts)
    changed = texts[0].replace("научного журнала", "школьного журнала").replace("выпиши из него", "выпиши оттуда")
    assert changed != texts[0]
    assert near_duplicates.split_shingles(changed, common) == near_duplicates.split_shingles(texts[0], common)


def test_an_exact_duplicate_is_not_a_near_duplicate():
    rng = random.Random(0)
    texts = [story(rng) for _ in range(20)]
    again = signed([*texts, *texts], texts)
    assert near_duplicates.find_within(again).tolist() == [-1] * 40
    assert near_duplicates.find_across(signed(texts), again).tolist() == [-1] * 20


def test_finds_a_near_duplicate_of_a_text_that_occurs_a_hundred_times():
    rng = random.Random(0)
    text = letter(rng)
    texts = [text] * 100 + [EDITS["add_sentence"](text, rng)] * 2
    near = near_duplicates.find_within(signatures(texts, frozenset()))
    assert near.tolist() == [-1] * 100 + [0, -1]


def test_a_short_text_is_only_compared_exactly():
    texts = ["Переведи на английский слово кот", "Переведи на английский слово кот!"]
    short = signatures(texts, frozenset())
    assert short.judged.tolist() == [False, False]
    assert near_duplicates.find_within(short).tolist() == [-1, -1]
    assert near_duplicates.find_across(short, short).tolist() == [-1, -1]


def test_finds_an_edited_text_among_many_similar_ones(monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(russian_texts, "_FORMS", russian_texts._FORMS[:1])
    texts = [letter(rng) for _ in range(3000)]
    edited = [EDITS["replace_words"](text, rng) for text in texts[:COUNT]]
    near = near_duplicates.find_across(*(signatures(side, frozenset()) for side in (edited, texts)))
    assert (near == np.arange(COUNT)).mean() >= 0.95


def test_a_signature_does_not_depend_on_the_batch():
    rng = random.Random(0)
    texts = [sentence(rng) for _ in range(2500)]
    streamed = signatures(texts, frozenset())
    assert len(streamed) == len(texts)
    one = signatures(texts[1700:1701], frozenset())
    assert (streamed.slots[1700], streamed.texts[1700], streamed.judged[1700]) == (
        pytest.approx(one.slots[0]),
        one.texts[0],
        one.judged[0],
    )


def test_a_record_takes_137_bytes():
    made = signatures([story(random.Random(0))] * 1000, frozenset())
    assert made.slots.nbytes + made.texts.nbytes + made.judged.nbytes == 137 * 1000


def test_no_records_have_no_near_duplicates():
    none = signatures([], frozenset())
    some = signatures([story(random.Random(0))], frozenset())
    assert near_duplicates.find_within(none).tolist() == []
    assert near_duplicates.find_across(none, some).tolist() == []
    assert near_duplicates.find_across(some, none).tolist() == [-1]


def test_signatures_do_not_depend_on_the_hash_seed():
    code = """
import hashlib, random, russian_texts
from saigakit.data import near_duplicates
signer = near_duplicates.Signer(frozenset())
signer.add(russian_texts.story(random.Random(0)))
made = signer.finish()
print(hashlib.sha256(made.slots.tobytes() + made.texts.tobytes()).hexdigest())
"""
    path = os.pathsep.join([str(Path(russian_texts.__file__).parent), str(Path(__file__).parents[2])])
    printed = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}, text=True
        )
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_only_user_texts_are_compared():
    messages = [
        {"role": "system", "content": "а"},
        {"role": "user", "content": "б"},
        {"role": "assistant", "content": "в"},
        {"role": "tool", "content": "г"},
        {"role": "user", "content": "д"},
    ]
    assert near_duplicates.join_user_texts(messages) == "б\nд"
