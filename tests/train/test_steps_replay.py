"""General dialogues mixed into training: how many, which, and which never."""

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
    return str(directory / "general.jsonl")


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("train", [1, 19, 190, 1001])
def test_the_share_of_an_epoch_is_the_fraction_to_the_nearest_conversation(train, fraction):
    for drawn in steps.choose_replay(train, 5000, fraction, 3, seed=1):
        assert abs(len(drawn) - fraction / (1 - fraction) * train) <= 0.5 + 1e-9
        assert abs(len(drawn) / (len(drawn) + train) - fraction) <= 0.5 / train


def test_nineteen_and_one_are_five_in_a_hundred():
    assert [len(drawn) for drawn in steps.choose_replay(190, 100, 0.05, 2, seed=1)] == [10, 10]


def test_none_is_drawn_again_before_all_have_been():
    drawn = list(chain(*steps.choose_replay(100, 37, 0.2, 4, seed=7)))  # 25 in each of four epochs: 100 of 37
    assert len(drawn) == 100
    assert sorted(drawn[:37]) == sorted(drawn[37:74]) == list(range(37))
    assert len(set(drawn[74:])) == 26
    assert drawn[:37] != drawn[37:74]


def test_fewer_than_an_epoch_needs_are_repeated_evenly():
    [drawn] = steps.choose_replay(100, 3, 0.5, 1, seed=7)
    assert sorted(Counter(drawn).values()) == [33, 33, 34]


def test_the_same_arguments_draw_the_same_and_another_seed_others():
    assert steps.choose_replay(100, 500, 0.3, 2, seed=5) == steps.choose_replay(100, 500, 0.3, 2, seed=5)
    assert steps.choose_replay(100, 500, 0.3, 2, seed=5) != steps.choose_replay(100, 500, 0.3, 2, seed=6)
    assert steps.choose_replay(10, 9, 0.3, 1, seed=5) == [[1, 5, 4, 8]]  # on every machine and version


def test_more_epochs_do_not_change_the_first_ones():
    assert steps.choose_replay(100, 60, 0.3, 4, seed=5)[:2] == steps.choose_replay(100, 60, 0.3, 2, seed=5)


def test_a_partial_epoch_has_its_own_draws():
    assert len(steps.choose_replay(100, 60, 0.3, 2.25, seed=5)) == 3
    assert len(steps.choose_replay(100, 60, 0.3, 0.5, seed=5)) == 1


def test_nothing_is_mixed_in_where_the_fraction_is_zero():
    assert steps.choose_replay(100, 60, 0, 2, seed=5) == [[], []]
    assert steps.choose_replay(100, 0, 0, 1, seed=5) == [[]]


@pytest.mark.parametrize("fraction", [1, 1.5, -0.1, float("nan")])
def test_a_fraction_that_is_no_share_is_refused(fraction):
    with pytest.raises(SaigaError, match="replay_fraction="):
        steps.choose_replay(100, 60, fraction, 1, seed=5)


def test_replay_without_conversations_is_refused():
    with pytest.raises(SaigaError, match="replay_file has no conversation"):
        steps.choose_replay(100, 0, 0.1, 1, seed=5)


def test_conversations_that_ask_held_out_questions_are_left_out_and_counted(tmp_path, capsys):
    held_out = store.as_dataset([talk("Сколько планет вокруг нашего Солнца?"), talk("Кто ты?")])
    name = file_of(tmp_path, ["Как дела сегодня у тебя?", "сколько  планет вокруг нашего солнца?", "Кто ты?", "Где?"])
    found = steps.read_replay(name, held_out)
    assert [each["messages"][0]["content"] for each in found] == ["Как дела сегодня у тебя?", "Где?"]
    assert asking_alike(found, held_out) == []
    assert "2 of 4 conversations ask held-out questions and are left out" in capsys.readouterr().out


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, capsys):
    name = file_of(tmp_path, ["Раз?", "Два?"])
    assert len(steps.read_replay(name, store.as_dataset([talk("Три?")]))) == len(steps.read_replay(name, None)) == 2
    assert capsys.readouterr().out == ""


def test_only_held_out_questions_are_refused(tmp_path):
    held_out = store.as_dataset([talk("Раз?"), talk("Два?")])
    with pytest.raises(SaigaError, match="all 2 conversations ask held-out questions"):
        steps.read_replay(file_of(tmp_path, ["Раз?", "Два?"]), held_out)


def test_bad_records_are_named_as_everywhere(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: "):
        steps.read_replay(str(tmp_path / "bad.jsonl"), None)


def stored(texts):
    examples = ({"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in texts)
    return rows.as_dataset(enumerate(examples, start=1))


def test_joined_rows_are_training_and_then_replay():
    joined = steps.join(stored([[1, 2], [3, 4, 5]]), stored([[6], [7, 8]]))
    assert [row["input_ids"] for row in joined] == [[1, 2], [3, 4, 5], [6], [7, 8]]
    assert list(rows.column(joined, "length")) == [2, 3, 1, 2]
    assert list(rows.column(joined, "learned")) == [1, 2, 0, 1]
    assert list(rows.column(joined, "conversation")) == [1, 2, -1, -2]
    with pytest.raises(IndexError):
        joined[4]


def test_an_epoch_of_joined_rows_has_all_of_training_and_what_is_drawn():
    joined = steps.join(stored([[1, 2]] * 18), stored([[3, 4]] * 5))
    numbers = rows.column(joined, "conversation")
    first, second = (list(epoch) for epoch in steps.epochs_with_replay(numbers, 0.1, 2, seed=3))
    assert first[:18] == second[:18] == list(range(18))
    assert (len(first), len(second)) == (20, 20)
    assert len({*first[18:], *second[18:]}) == 4 and {*first[18:], *second[18:]} <= set(range(18, 23))


def test_what_is_mixed_in_is_told_in_words():
    assert steps.replay_in_words(18, 5, 0.1) == "In each epoch 2 general conversations beside 18 of training."
    assert steps.replay_in_words(18, 5, 0.5).endswith("some more than once: there are 5.")
