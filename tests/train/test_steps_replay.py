"""Replay records mixed into training."""

import json
from collections import Counter
from itertools import chain

import pytest

from saigakit.data import rows, store
from saigakit.data.conversations import asking_alike
from saigakit.errors import DataError, SaigaError
from saigakit.train import steps


def talk(question):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Да."}]}


def file_of(directory, questions):
    lines = [json.dumps(talk(question), ensure_ascii=False) + "\n" for question in questions]
    (directory / "general.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory / "general.jsonl"


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("train", [1, 19, 190, 1001])
def test_replay_share_is_the_fraction_to_the_nearest_conversation(train, fraction):
    for drawn in steps.choose_replay(train, 5000, fraction, 3, seed=1):
        assert abs(len(drawn) - fraction / (1 - fraction) * train) <= 0.5 + 1e-9
        assert abs(len(drawn) / (len(drawn) + train) - fraction) <= 0.5 / train


def test_one_replay_record_per_nineteen_is_five_percent():
    assert [len(drawn) for drawn in steps.choose_replay(190, 100, 0.05, 2, seed=1)] == [10, 10]


def test_draws_every_record_before_repeating_one():
    drawn = list(chain(*steps.choose_replay(100, 37, 0.2, 4, seed=7)))  # 25 in each of four epochs: 100 of 37
    assert len(drawn) == 100
    assert sorted(drawn[:37]) == sorted(drawn[37:74]) == list(range(37))
    assert len(set(drawn[74:])) == 26
    assert drawn[:37] != drawn[37:74]


def test_repeats_too_few_records_evenly():
    [drawn] = steps.choose_replay(100, 3, 0.5, 1, seed=7)
    assert sorted(Counter(drawn).values()) == [33, 33, 34]


def test_draws_depend_on_the_seed_alone():
    assert steps.choose_replay(100, 500, 0.3, 2, seed=5) == steps.choose_replay(100, 500, 0.3, 2, seed=5)
    assert steps.choose_replay(100, 500, 0.3, 2, seed=5) != steps.choose_replay(100, 500, 0.3, 2, seed=6)
    assert steps.choose_replay(10, 9, 0.3, 1, seed=5) == [[1, 5, 4, 8]]  # on every machine and version


def test_more_epochs_do_not_change_the_first_ones():
    assert steps.choose_replay(100, 60, 0.3, 4, seed=5)[:2] == steps.choose_replay(100, 60, 0.3, 2, seed=5)


def test_partial_epoch_has_its_own_draws():
    assert len(steps.choose_replay(100, 60, 0.3, 2.25, seed=5)) == 3
    assert len(steps.choose_replay(100, 60, 0.3, 0.5, seed=5)) == 1


def test_fraction_of_zero_draws_nothing():
    assert steps.choose_replay(100, 60, 0, 2, seed=5) == [[], []]
    assert steps.choose_replay(100, 0, 0, 1, seed=5) == [[]]


def test_leaves_out_and_counts_replay_that_asks_evaluation_questions(tmp_path, capsys):
    held_out = store.as_dataset([talk("Сколько планет вокруг нашего Солнца?"), talk("Кто ты?")])
    file = file_of(tmp_path, ["Как дела сегодня у тебя?", "сколько  планет вокруг нашего солнца?", "Кто ты?", "Где?"])
    found = steps.read_replay("general", [file], held_out)
    assert [each["messages"][0]["content"] for each in found] == ["Как дела сегодня у тебя?", "Где?"]
    assert asking_alike(found, held_out) == []
    assert (
        "general: leaving out 2 of 4 conversations, for asking questions of the evaluation set"
        in capsys.readouterr().out
    )


def test_prints_nothing_if_no_replay_is_left_out(tmp_path, capsys):
    file = file_of(tmp_path, ["Раз?", "Два?"])
    for held_out in (store.as_dataset([talk("Три?")]), None):
        assert len(steps.read_replay("general", [file], held_out)) == 2
    assert capsys.readouterr().out == ""


def test_refuses_replay_of_evaluation_questions_alone(tmp_path):
    held_out = store.as_dataset([talk("Раз?"), talk("Два?")])
    with pytest.raises(SaigaError, match=r"all conversations \(2\) ask questions of the evaluation set"):
        steps.read_replay("general", [file_of(tmp_path, ["Раз?", "Два?"])], held_out)


def test_names_bad_replay_records(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: "):
        steps.read_replay("general", [tmp_path / "bad.jsonl"], None)


def stored(texts):
    examples = ({"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in texts)
    return rows.as_dataset(enumerate(examples, start=1))


def test_mixed_rows_are_training_then_replay():
    mixed = steps.mix_rows(stored([[1, 2], [3, 4, 5]]), stored([[6], [7, 8]]))
    assert [row["input_ids"] for row in mixed] == [[1, 2], [3, 4, 5], [6], [7, 8]]
    assert list(rows.read_column(mixed, "length")) == [2, 3, 1, 2]
    assert list(rows.read_column(mixed, "learned")) == [1, 2, 0, 1]
    assert list(rows.read_column(mixed, "conversation")) == [1, 2, -1, -2]
    with pytest.raises(IndexError):
        mixed[4]


def test_epoch_of_mixed_rows_has_all_training_and_the_drawn_replay():
    numbers = rows.read_column(steps.mix_rows(stored([[1, 2]] * 18), stored([[3, 4]] * 5)), "conversation")
    first, second = (list(epoch) for epoch in steps.epochs_with_replay(numbers, 0.1, 2, seed=3))
    assert first[:18] == second[:18] == list(range(18))
    assert (len(first), len(second)) == (20, 20)
    assert len({*first[18:], *second[18:]}) == 4 and {*first[18:], *second[18:]} <= set(range(18, 23))


def test_describes_the_replay_of_an_epoch():
    assert steps.describe_mix(18, 5, 0.1) == "Each epoch mixes 2 replay conversations into 18 of training."
    assert steps.describe_mix(18, 5, 0.5).endswith("; there are only 5, so some are repeated.")


@pytest.mark.parametrize("bad", [1, 2, 3, 4])
def test_bad_replay_records_are_left_out_unless_they_are_most(tmp_path, capsys, bad):
    file = file_of(tmp_path, [f"Вопрос {number}?" for number in range(4 - bad)])
    file.write_text("{}\n" * bad + file.read_text(encoding="utf-8"), encoding="utf-8")
    if bad > 2:
        with pytest.raises(DataError, match=rf"{bad} of 4 records cannot be used[^0]*general\.jsonl:1: "):
            steps.read_replay("general", [file], None)
    else:
        assert len(steps.read_replay("general", [file], None)) == 4 - bad
        assert f"general.jsonl: {bad} of 4 records cannot be used: left out. The first: general.jsonl:1: " in (
            capsys.readouterr().out
        )
