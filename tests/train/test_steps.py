"""The plan of a run's steps."""

import tracemalloc

import pytest
from datasets import Dataset

from saigakit.config import TrainConfig
from saigakit.data import rows
from saigakit.prompt.encoding import IGNORE_INDEX
from saigakit.train.steps import Plan


def stored(lengths):
    """Rows of these lengths in tokens, with the second half trained; the ids of row n are n."""

    def row(number, length):
        untrained = [IGNORE_INDEX] * (length // 2)
        return {"input_ids": [number] * length, "labels": untrained + [number] * (length - length // 2)}

    return rows.as_dataset((number + 1, row(number, length)) for number, length in enumerate(lengths))


def plan_of(documents, *, processes=1, process=0, **settings):
    config = TrainConfig(
        **{"model": "saiga_tiny", "train_file": "", "output_dir": "", "max_seq_length": 100, **settings}
    )
    return Plan(config, documents, processes=processes, process=process)


def shown(plan, step):
    """The rows of a step in the packs of this process."""
    return [row for pack in plan[step].packs for row in pack["input_ids"][pack["position_ids"] == 0].tolist()]


LENGTHS = [20 + index % 30 for index in range(200)]


def test_each_epoch_has_each_conversation_once_in_another_order():
    plan = plan_of(stored(LENGTHS), epochs=2, batch_size=16)
    order = [row for step in range(len(plan)) for row in sorted(shown(plan, step))]
    assert len(order) == 400
    assert sorted(plan.order[:200]) == sorted(plan.order[200:]) == list(range(200))
    assert plan.order[:200] != plan.order[200:]


@pytest.mark.parametrize(("epochs", "batch_size", "sizes"), [(2, 16, {16}), (1, 30, {30, 20}), (0.5, 7, {7, 2})])
def test_every_step_but_the_last_has_batch_size_conversations(epochs, batch_size, sizes):
    plan = plan_of(stored(LENGTHS), epochs=epochs, batch_size=batch_size)
    found = [len(shown(plan, step)) for step in range(len(plan))]
    assert set(found[:-1]) == {batch_size}
    assert set(found) == sizes


@pytest.mark.parametrize("count", [60, 61, 200])
def test_number_of_steps_does_not_depend_on_length(count):
    plan = plan_of(stored([10] * count), epochs=1, batch_size=4)
    assert len(plan) == -(-count // 4)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_the_conversations_of_a_step(processes):
    documents = stored(LENGTHS)
    alone = plan_of(documents, epochs=1.3, batch_size=9)
    together = [
        plan_of(documents, epochs=1.3, batch_size=9, processes=processes, process=number) for number in range(processes)
    ]
    assert {len(plan) for plan in together} == {len(alone)}
    for step in range(len(alone)):
        parts = [row for plan in together if plan[step].counted for row in shown(plan, step)]
        assert sorted(parts) == sorted(shown(alone, step))
        assert {plan[step].learned for plan in together} == {alone[step].learned}


def test_process_without_a_conversation_gets_one_with_no_weight():
    documents = stored([10] * 4)
    plans = [plan_of(documents, epochs=1, batch_size=3, processes=2, process=number) for number in range(2)]
    assert [(len(plan[1].packs), plan[1].counted) for plan in plans] == [(1, 1), (1, 0)]


def test_packs_stay_within_the_budget_and_tokens_are_counted():
    plan = plan_of(stored(LENGTHS), epochs=1, batch_size=16)
    packs = [pack for step in range(len(plan)) for pack in plan[step].packs]
    assert max(pack["input_ids"].shape[1] for pack in packs) <= 100
    assert plan.tokens == sum(pack["input_ids"].shape[1] for pack in packs) == sum(LENGTHS)
    for step in range(len(plan)):
        assert plan[step].learned == sum(pack["logits_to_keep"].numel() for pack in plan[step].packs)


def test_numbers_identify_the_conversations_of_a_step():
    examples = ((number, {"input_ids": [number] * 5, "labels": [number] * 5}) for number in (3, 7, 8, 20))
    plan = plan_of(rows.as_dataset(examples), epochs=1, batch_size=2)
    assert [plan.numbers(step) for step in range(2)] == [sorted(shown(plan, step)) for step in range(2)]


def test_plan_needs_little_memory():
    columns = {"length": [500], "learned": [50], "conversation": [1]}
    many = Dataset.from_dict({name: values * 200_000 for name, values in columns.items()})
    tracemalloc.start()
    plan = plan_of(many, epochs=1, batch_size=16, max_seq_length=1024)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan) == 12_500
    assert kept < 4.4e6  # 16 bytes a conversation, 16 a step
