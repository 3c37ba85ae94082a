"""Packing documents."""

import math
import random

import pytest
import torch

from saigakit.prompt.encoding import IGNORE_INDEX
from saigakit.train.steps import assign_packs, best_fit, collate, order_conversations

VOCABULARY = 50


def random_lengths(seed: int, count: int = 200, budget: int = 64) -> list[int]:
    rng = random.Random(seed)
    return [min(budget, max(1, int(rng.lognormvariate(2.5, 0.8)))) for _ in range(count)]


def document(rng: random.Random, length: int) -> dict[str, list[int]]:
    """A document whose second half is trained, and also its first token, which `collate` must ignore."""
    ids = [rng.randrange(VOCABULARY) for _ in range(length)]
    return {"input_ids": ids, "labels": [ids[0], *([IGNORE_INDEX] * (length // 2 - 1)), *ids[length // 2 :]]}


@pytest.fixture
def documents() -> list[dict[str, list[int]]]:
    rng = random.Random(5)
    return [document(rng, length) for length in (7, 12, 4, 9)]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_stays_within_the_budget_and_places_each_document_once(seed):
    lengths = random_lengths(seed)
    packs = best_fit(lengths, 64)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= 64 for pack in packs)


def test_best_fit_packs_are_nearly_full():
    lengths = random_lengths(1, count=1000)
    assert len(best_fit(lengths, 64)) <= 1.02 * sum(lengths) / 64 + 1


def test_best_fit_uses_the_fullest_pack_with_room():
    assert best_fit([7, 6, 3], 10) == [[0, 2], [1]]


def test_documents_of_budget_size_get_their_own_packs():
    assert best_fit([10, 10, 10], 10) == [[0], [1], [2]]


def test_no_documents_give_no_packs():
    assert best_fit([], 10) == []


def test_refuses_a_document_over_the_budget():
    with pytest.raises(ValueError, match="11 tokens does not fit into a pack of 10"):
        best_fit([3, 11], 10)


def test_every_epoch_has_each_conversation_once():
    shown = order_conversations([range(1200)] * 3, 3, seed=1)
    assert all(sorted(shown[start : start + 1200]) == list(range(1200)) for start in (0, 1200, 2400))


def test_epochs_have_different_orders():
    shown = order_conversations([range(1200)] * 2, 2, seed=1)
    assert sum(a == b for a, b in zip(shown[:1200], shown[1200:], strict=True)) < 20


@pytest.mark.parametrize(("epochs", "count"), [(1.5, 1800), (0.5, 600), (0.0001, 1), (0.1 + 0.2, 360)])
def test_fractional_last_epoch_is_a_prefix(epochs, count):
    assert (
        list(order_conversations([range(1200)] * math.ceil(epochs), epochs, seed=1))
        == list(order_conversations([range(1200)] * 2, 2, seed=1))[:count]
    )


def test_order_depends_on_the_seed_alone():
    orders = [list(order_conversations([range(1200)] * 1, 1, seed=seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_assigned_packs_stay_within_the_budget_and_hold_each_document_once(seed, processes):
    lengths = random_lengths(seed, count=16)
    laid = assign_packs(lengths, budget=64, processes=processes)
    assert len(laid) == processes
    assert sorted(index for packs in laid for pack in packs for index in pack) == list(range(16))
    assert all(0 < sum(lengths[index] for index in pack) <= 64 for packs in laid for pack in packs)


@pytest.mark.parametrize("seed", range(5))
def test_processes_get_nearly_the_same_number_of_tokens(seed):
    lengths = random_lengths(seed, count=32)
    tokens = [
        sum(lengths[index] for pack in packs for index in pack)
        for packs in assign_packs(lengths, budget=64, processes=2)
    ]
    assert max(tokens) - min(tokens) <= min(lengths) + 2


def test_one_process_gets_the_fewest_packs_that_fit():
    assert [len(pack) for pack in assign_packs([30, 30, 30, 34, 34, 34], budget=64, processes=1)[0]] == [2, 2, 2]


def test_each_process_gets_a_document_if_there_are_enough():
    assert all(assign_packs([60, 1, 1, 1], budget=64, processes=4))
    assert [len(packs) for packs in assign_packs([5, 5], budget=64, processes=3)] == [1, 1, 0]


def test_positions_restart_at_every_document(documents):
    assert collate(documents)["position_ids"].tolist() == [[*range(7), *range(12), *range(4), *range(9)]]


def test_pack_has_no_attention_mask(documents):
    """A mask would mix the documents: see the test below."""
    assert "attention_mask" not in collate(documents)


def test_first_token_of_a_document_is_never_trained(documents):
    labels = collate(documents)["labels"][0]
    assert [labels[start].item() for start in (0, 7, 19, 23)] == [IGNORE_INDEX] * 4
    assert [row["labels"][0] for row in documents] != [IGNORE_INDEX] * 4


def test_other_labels_are_those_of_the_documents(documents):
    labels = collate(documents)["labels"][0].tolist()
    assert labels == [label for row in documents for label in (IGNORE_INDEX, *row["labels"][1:])]


def test_logits_are_kept_where_the_next_token_is_trained(documents):
    batch = collate(documents)
    labels, kept = batch["labels"][0], batch["logits_to_keep"]
    assert batch["shift_labels"][0].tolist() == labels[kept + 1].tolist()
    assert len(kept) == (labels != IGNORE_INDEX).sum()


def random_llama(kv_heads: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module", params=[4, 2], ids=["multi-head", "grouped-query"])
def llama(request) -> torch.nn.Module:
    return random_llama(request.param)


def one_by_one(llama, documents) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([llama(torch.tensor([row["input_ids"]])).logits[0] for row in documents])


def packed(llama, documents, **more) -> torch.Tensor:
    batch = collate(documents)
    with torch.no_grad():
        return llama(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **more).logits[0]


def test_logits_of_a_pack_equal_those_of_its_documents(llama, documents):
    assert (packed(llama, documents) - one_by_one(llama, documents)).abs().max() < 1e-12


def test_mask_of_ones_would_mix_documents(llama, documents):
    """transformers separates documents by their positions only if there is no mask."""
    mask = torch.ones(1, sum(len(row["input_ids"]) for row in documents), dtype=torch.long)
    difference = (packed(llama, documents, attention_mask=mask) - one_by_one(llama, documents)).abs()
    assert difference[:7].max() < 1e-12
    assert difference[7:].max() > 0.1


def test_loss_of_a_pack_is_the_mean_over_its_trained_tokens(llama, documents):
    with torch.no_grad():
        output = llama(**collate(documents), use_cache=False)
    losses = []
    for row in documents:
        logits = one_by_one(llama, [row]).log_softmax(-1)
        losses += [-logits[i, label] for i, label in enumerate(row["labels"][1:]) if label != IGNORE_INDEX]
    assert output.logits.shape[1] == len(losses)
    assert abs(output.loss - torch.stack(losses).mean()) < 1e-6


def test_gradients_of_a_pack_equal_those_of_its_documents(llama, documents):
    llama.zero_grad()
    llama(**collate(documents), use_cache=False, num_items_in_batch=1).loss.backward()
    together = [parameter.grad.clone() for parameter in llama.parameters()]
    llama.zero_grad()
    for row in documents:
        llama(**collate([row]), use_cache=False, num_items_in_batch=1).loss.backward()
    apart = [parameter.grad for parameter in llama.parameters()]
    # The loss is computed in float32.
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(together, apart, strict=True))
    llama.zero_grad()
