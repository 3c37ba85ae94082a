"""Near-duplicates of texts that are edited on purpose, and none among texts that only share a form."""

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
    return signatures(texts, near_duplicates.boilerplate(texts if among is None else among))


@ALL_SEEDS
@KINDS
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_text_in_held_out_is_found_with_its_original_in_training(edit, kind, seed):
    rng = random.Random(seed)
    training = [kind(rng) for _ in range(COUNT)]
    held_out = [edit(text, rng) for text in training]
    near = near_duplicates.across(signed(held_out, training), signed(training))
    assert (near == np.arange(COUNT)).mean() >= 0.95


@ALL_SEEDS
@KINDS
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_text_is_found_with_the_earlier_one_of_the_two(edit, kind, seed):
    rng = random.Random(seed)
    originals = [kind(rng) for _ in range(COUNT)]
    texts = [*originals, *(edit(text, rng) for text in originals)]
    near = near_duplicates.within(signed(texts, originals))
    assert (near[COUNT:] == np.arange(COUNT)).mean() >= 0.95
    assert (near[:COUNT] == -1).mean() >= 0.99


@ALL_SEEDS
@KINDS
def test_new_texts_are_near_to_none(kind, seed):
    rng = random.Random(seed)
    training, held_out = ([kind(rng) for _ in range(3 * COUNT)] for _ in range(2))
    assert (near_duplicates.within(signed(training)) >= 0).mean() <= 0.01
    assert (near_duplicates.across(signed(held_out, training), signed(training)) >= 0).mean() <= 0.01


def test_texts_with_half_of_their_sentences_in_common_are_not_near():
    rng = random.Random(0)
    training, held_out = [], []
    for _ in range(COUNT):
        shared, *own = ([sentence(rng) for _ in range(6)] for _ in range(3))
        training.append(" ".join([*shared, *own[0]]))
        held_out.append(" ".join([*shared, *own[1]]))
    near = near_duplicates.across(*(signatures(side, frozenset()) for side in (held_out, training)))
    assert (near >= 0).mean() <= 0.01


def test_a_common_instruction_makes_no_text_near_to_another():
    rng = random.Random(0)
    texts = [f"{INSTRUCTION} {sentence(rng)} {sentence(rng)}" for _ in range(COUNT)]
    assert (near_duplicates.within(signatures(texts, frozenset())) >= 0).mean() > 0.5
    assert (near_duplicates.within(signed(texts)) >= 0).mean() <= 0.01


def test_an_instruction_in_twelve_wordings_makes_no_text_near_to_another():
    rng = random.Random(0)
    words = INSTRUCTION.split()
    wordings = [" ".join(rng.sample(words, len(words))) for _ in range(12)]
    texts = [f"{rng.choice(wordings)} {sentence(rng)} {sentence(rng)}" for _ in range(10 * COUNT)]
    assert (near_duplicates.within(signatures(texts, frozenset())) >= 0).mean() > 0.5
    assert (near_duplicates.within(signed(texts)) >= 0).mean() <= 0.01


def test_boilerplate_is_what_more_than_a_fifth_and_ten_at_least_share():
    assert near_duplicates.boilerplate(["переведи слово"] * 10 + ["кот"] * 39) == {"переведи слово"}
    assert near_duplicates.boilerplate(["переведи слово"] * 9) == frozenset()
    assert near_duplicates.boilerplate(["переведи слово"] * 12 + ["кот"] * 48) == frozenset()
    assert near_duplicates.boilerplate(["переведи слово"] * 13 + ["кот"] * 47) == {"переведи слово"}
    assert near_duplicates.boilerplate(["переведи слово"] * 50 + ["кот"] * 950) == {"переведи слово"}


def test_boilerplate_is_looked_for_in_a_thousand_texts_alone():
    texts = iter(["кот"] * near_duplicates.SAMPLE + ["переведи слово"] * 500)
    assert near_duplicates.boilerplate(texts) == frozenset()
    assert len(list(texts)) == 500


def test_a_word_changed_in_the_instruction_is_no_content():
    rng = random.Random(0)
    texts = [story(rng) for _ in range(COUNT)]
    common = near_duplicates.boilerplate(texts)
    changed = texts[0].replace("научного журнала", "школьного журнала").replace("выпиши из него", "выпиши оттуда")
    assert changed != texts[0]
    assert near_duplicates.shingles(changed, common) == near_duplicates.shingles(texts[0], common)


def test_an_exact_duplicate_is_no_near_one():
    rng = random.Random(0)
    texts = [story(rng) for _ in range(20)]
    again = signed([*texts, *texts], texts)
    assert near_duplicates.within(again).tolist() == [-1] * 40
    assert near_duplicates.across(signed(texts), again).tolist() == [-1] * 20


def test_a_near_duplicate_of_a_text_that_is_there_a_hundred_times_is_found():
    rng = random.Random(0)
    text = letter(rng)
    texts = [text] * 100 + [EDITS["add_sentence"](text, rng)] * 2
    near = near_duplicates.within(signatures(texts, frozenset()))
    assert near.tolist() == [-1] * 100 + [0, -1]


def test_a_text_of_few_words_is_left_to_the_exact_comparison():
    texts = ["Переведи на английский слово кот", "Переведи на английский слово кот!"]
    short = signatures(texts, frozenset())
    assert short.judged.tolist() == [False, False]
    assert near_duplicates.within(short).tolist() == [-1, -1]
    assert near_duplicates.across(short, short).tolist() == [-1, -1]


def test_an_edited_text_is_found_among_many_of_its_form(monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(russian_texts, "_FORMS", russian_texts._FORMS[:1])
    texts = [letter(rng) for _ in range(3000)]
    edited = [EDITS["replace_words"](text, rng) for text in texts[:COUNT]]
    near = near_duplicates.across(*(signatures(side, frozenset()) for side in (edited, texts)))
    assert (near == np.arange(COUNT)).mean() >= 0.95


def test_one_of_many_texts_is_signed_as_alone():
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


def test_no_records_have_no_near_ones():
    none = signatures([], frozenset())
    some = signatures([story(random.Random(0))], frozenset())
    assert near_duplicates.within(none).tolist() == []
    assert near_duplicates.across(none, some).tolist() == []
    assert near_duplicates.across(some, none).tolist() == [-1]


def test_signatures_do_not_depend_on_the_processs_hashes():
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


def test_only_what_the_user_says_is_compared():
    messages = [
        {"role": "system", "content": "а"},
        {"role": "user", "content": "б"},
        {"role": "assistant", "content": "в"},
        {"role": "tool", "content": "г"},
        {"role": "user", "content": "д"},
    ]
    assert near_duplicates.said_by_user(messages) == "б\nд"
