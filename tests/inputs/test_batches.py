"""Batches: which examples go together, how they are padded, and what a model is given."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.errors import DataError
from geomkit.inputs.batches import IGNORED, batches, collate, plan_batches
from geomkit.inputs.tokens import Tokens, encode
from tests.helpers.tiny import UTILITY, tiny_tokenizer

ROWS = [Tokens((5, 6, 7), (False, True, True)), Tokens((8, 9), (False, True))]


@pytest.mark.parametrize(
    ("side", "ids", "labels"),
    [
        ("right", [[5, 6, 7], [8, 9, 0]], [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]),
        ("left", [[5, 6, 7], [0, 8, 9]], [[IGNORED, 6, 7], [IGNORED, IGNORED, 9]]),
    ],
)
def test_padding_goes_to_one_side_and_counts_nowhere(side, ids, labels):
    batch = collate(ROWS, pad=0, side=side)
    assert batch.input_ids.tolist() == ids
    assert batch.labels.tolist() == labels
    assert torch.equal(batch.attention_mask, (torch.tensor(ids) != 0).long())


def test_a_pad_token_that_also_occurs_as_text_still_counts():
    batch = collate([Tokens((5, 0), (False, True)), Tokens((5, 6, 7), (False, True, True))], pad=0)
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels[0].tolist() == [IGNORED, 0, IGNORED]


def test_batches_keep_the_order_and_say_which_rows_they_hold():
    rows = encode(tiny_tokenizer(), UTILITY)
    result = list(batches(rows, 0, 3))
    assert [batch.examples for batch in result] == [(0, 1, 2), (3,)]
    assert result[1].input_ids[0].tolist() == list(rows[3].input_ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_every_example_is_in_one_batch_within_the_budget(lengths, budget):
    plan = plan_batches(lengths, budget)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= budget
    longest = [max(lengths[index] for index in batch) for batch in plan]
    assert longest == sorted(longest, reverse=True)
    # The first example of a batch does not fit into the batch before.
    for batch, following in pairwise(plan):
        assert following
        assert lengths[batch[0]] * (len(batch) + 1) > budget


def test_a_budget_below_one_is_refused():
    with pytest.raises(
        DataError, match="expected tokens_per_batch to be a whole number from 1 to 1,000,000,000, found 0"
    ):
        plan_batches([3], 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_one_example_of_a_batch_without_its_padding(side):
    rows = [Tokens((5, 6, 7), (False, True, True)), Tokens((8, 9), (False, True))]
    batch = collate(rows, 0, examples=[4, 2], side=side, min_length=6)
    assert batch.input_ids.shape == (2, 6)
    alone = batch.single(1)
    assert alone.input_ids.tolist() == [[8, 9]]
    assert alone.labels.tolist() == [[-100, 9]]
    assert alone.attention_mask.tolist() == [[1, 1]]
    assert alone.examples == (2,)


def test_positions_are_given_where_padding_shifts_them():
    rows = [Tokens((5, 6, 7), (False, True, True)), Tokens((8, 9), (False, True))]
    assert set(collate(rows, 0).inputs()) == {"input_ids", "attention_mask"}
    shifted = collate(rows, 0, side="left").inputs()["position_ids"]
    assert torch.equal(shifted, torch.tensor([[0, 1, 2], [0, 0, 1]]))
