"""Batches by token budget, examples that are encoded when they are read, and what a model is given."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.errors import DataError
from geomkit.inputs.batches import collate, plan_batches
from geomkit.inputs.tokens import (
    Tokens,
    as_encoded,
    conversations_of,
    encode,
    encode_at_once,
    lengths_of,
    tokens_fingerprint,
)
from tests.helpers.tiny import SAFETY, UTILITY, conversations, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_every_example_is_in_one_batch_within_the_budget(lengths, budget):
    plan = plan_batches(lengths, budget)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= budget
    longest = [max(lengths[index] for index in batch) for batch in plan]
    assert longest == sorted(longest, reverse=True)
    # No two neighbours could have been one batch.
    for one, other in pairwise(plan):
        assert other
        assert lengths[one[0]] * (len(one) + 1) > budget


def test_a_budget_below_one_is_refused():
    with pytest.raises(DataError, match="at least one token per batch, found 0"):
        plan_batches([3], 0)


def test_lazy_examples_are_those_encoded_at_once():
    lazy, eager = encode(TOKENIZER, UTILITY), encode_at_once(TOKENIZER, UTILITY["messages"])
    assert list(lazy) == [lazy[index] for index in range(len(lazy))] == eager
    assert lazy[1:3] == eager[1:3]
    assert lazy[-1] == eager[-1]
    assert list(lengths_of(lazy)) == lengths_of(eager) == [len(row) for row in eager]
    assert lazy.fingerprint == tokens_fingerprint(eager)


def test_encoded_examples_are_selected_and_encoded_alike():
    rows = encode(TOKENIZER, UTILITY, assistant_mask="prefix", max_length=9)
    some = rows.select([2, 0])
    assert list(some) == [rows[2], rows[0]]
    assert (some.assistant_mask, some.max_length) == ("prefix", 9)
    assert list(rows.like(SAFETY)) == list(encode(TOKENIZER, SAFETY, assistant_mask="prefix", max_length=9))


def test_examples_are_encoded_once_and_with_the_tokenizer_that_uses_them():
    rows = encode(TOKENIZER, UTILITY, max_length=9)
    assert as_encoded(TOKENIZER, rows) is rows
    assert as_encoded(tiny_tokenizer(), rows) is rows
    assert list(as_encoded(TOKENIZER, UTILITY)) == list(encode(TOKENIZER, UTILITY))
    assert conversations_of(rows) is conversations_of(UTILITY) is UTILITY
    other = tiny_tokenizer()
    other.chat_template += " "
    with pytest.raises(DataError, match=r"expected examples encoded with the tokenizer of .* encode them with this"):
        as_encoded(other, rows)


def test_a_bad_example_is_found_before_anything_runs():
    rows = conversations(("help", "sure"), ("help", "sure"))
    rows = rows.map(lambda row, index: row if index else {"messages": row["messages"][:1]}, with_indices=True)
    with pytest.raises(DataError, match="example 0: expected assistant tokens"):
        encode(TOKENIZER, rows)


@pytest.mark.parametrize("side", ["right", "left"])
def test_one_example_of_a_batch_without_its_padding(side):
    rows = [Tokens((5, 6, 7), (False, True, True)), Tokens((8, 9), (False, True))]
    batch = collate(rows, 0, examples=[4, 2], side=side, least=6)
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
