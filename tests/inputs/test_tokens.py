"""Encoding conversations: token ids, the mask of the assistant's tokens, and examples that are encoded when read."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset

from geomkit.errors import DataError
from geomkit.inputs.tokens import (
    as_encoded,
    conversations_of,
    encode,
    encode_at_once,
    lengths_of,
    pad_id,
    tokens_fingerprint,
)
from tests.helpers.tiny import PLAIN_TEMPLATE, SAFETY, TEMPLATE, UTILITY, conversations, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
USER, ASSISTANT = {"role": "user", "content": "help"}, {"role": "assistant", "content": "sure"}


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_the_mask_holds_the_assistants_words_and_its_end():
    tokenizer = tiny_tokenizer()
    (row,) = encode(tokenizer, SAFETY.select([2]))
    words = "[user] how can we steal a brush [assistant] no [end]"
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == words.split()
    assert row.loss_mask == (False,) * 8 + (True,) * 2
    assert (len(row), row.loss_tokens) == (10, 2)


def test_prefixes_find_the_tokens_that_the_markers_mark():
    turns = [USER, ASSISTANT, {"role": "user", "content": "paint"}, {"role": "assistant", "content": "no way"}]
    examples = Dataset.from_list([*UTILITY, {"messages": turns}])
    marked = list(encode(tiny_tokenizer(), examples))
    assert list(encode(tiny_tokenizer(), examples, assistant_mask="prefix")) == marked
    assert list(encode(tokenizer_with(PLAIN_TEMPLATE), examples, assistant_mask="prefix")) == marked
    assert marked[-1].loss_tokens == 5


def test_prefixes_need_a_template_that_only_ever_adds():
    changing = "{% if messages | length > 1 %}no {% endif %}" + PLAIN_TEMPLATE
    with pytest.raises(DataError, match=r"example 0: .* prefixes cannot tell the assistant's tokens"):
        encode(tokenizer_with(changing), SAFETY, assistant_mask="prefix")
    with pytest.raises(DataError, match="example 0: expected a message before the assistant's first"):
        encode(tiny_tokenizer(), Dataset.from_list([{"messages": [ASSISTANT]}]), assistant_mask="prefix")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "expected a tokenizer with a chat template, found none"),
        (PLAIN_TEMPLATE, r"expected a chat template that marks .* found no marker; .*--assistant-mask prefix"),
        (TEMPLATE.replace("'assistant'", "'bot'"), r"example 0: expected assistant tokens .*\(13 tokens, all masked\)"),
    ],
)
def test_a_template_that_does_not_serve_is_refused(template, message):
    with pytest.raises(DataError, match=message):
        encode(tokenizer_with(template), SAFETY, assistant_mask="template")


def test_max_length_cuts_from_the_right_and_must_leave_something():
    whole = encode(tiny_tokenizer(), UTILITY)
    cut = encode(tiny_tokenizer(), UTILITY, max_length=9)
    assert all(short.input_ids == long.input_ids[:9] for short, long in zip(cut, whole, strict=True))
    with pytest.raises(DataError, match=r"example 0: .* found none within the first 4 tokens .* raise max_length"):
        encode(tiny_tokenizer(), UTILITY, max_length=4)
    with pytest.raises(DataError, match="expected max_length to be a whole number from 1 to 1,000,000,000, found -5"):
        encode(tiny_tokenizer(), UTILITY, max_length=-5)


def test_a_set_without_rows_or_without_messages_is_refused():
    with pytest.raises(DataError, match="expected at least one example"):
        encode(tiny_tokenizer(), SAFETY.select([]))
    with pytest.raises(DataError, match=r"expected a column 'messages', found \['prompt'\]; load the set with"):
        encode(tiny_tokenizer(), Dataset.from_list([{"prompt": "help"}]))


def test_an_unknown_assistant_mask_is_refused():
    with pytest.raises(DataError, match=r"expected .*mask.*template.*prefix.* found .*x"):
        encode(TOKENIZER, SAFETY, assistant_mask="x")


def test_a_tokenizer_without_a_pad_token_is_refused():
    tokenizer = tiny_tokenizer()
    assert pad_id(tokenizer) == 0
    tokenizer.pad_token = None
    with pytest.raises(DataError, match=r"expected a tokenizer with a pad token, found none .* \(--pad-token TOKEN"):
        pad_id(tokenizer)


def test_the_same_conversation_gives_the_same_tokens_whatever_stands_beside_it():
    alone = list(encode(tiny_tokenizer(), conversations(("help", "sure"))))
    together = encode(tiny_tokenizer(), conversations(("steal the bike", "no"), ("help", "sure")))
    assert list(together[1:]) == alone


def test_lazy_examples_are_those_encoded_at_once():
    lazy, eager = encode(TOKENIZER, UTILITY), encode_at_once(TOKENIZER, UTILITY["messages"])
    assert list(lazy) == [lazy[index] for index in range(len(lazy))] == eager
    assert list(lazy[1:3]) == eager[1:3]
    assert lazy[-1] == eager[-1]
    assert list(lengths_of(lazy)) == lengths_of(eager) == [len(row) for row in eager]
    assert lazy.fingerprint == tokens_fingerprint(eager)


def test_encoded_examples_are_selected_and_encoded_alike():
    rows = encode(TOKENIZER, UTILITY, assistant_mask="prefix", max_length=9)
    selected = rows.select([2, 0])
    assert list(selected) == [rows[2], rows[0]]
    assert (selected.assistant_mask, selected.max_length) == ("prefix", 9)
    assert list(rows.like(SAFETY)) == list(encode(TOKENIZER, SAFETY, assistant_mask="prefix", max_length=9))


def test_examples_are_encoded_once_and_with_the_tokenizer_that_uses_them():
    rows = encode(TOKENIZER, UTILITY, max_length=9)
    assert as_encoded(TOKENIZER, rows) is rows
    assert as_encoded(tiny_tokenizer(), rows) is rows
    assert list(as_encoded(TOKENIZER, UTILITY)) == list(encode(TOKENIZER, UTILITY))
    assert conversations_of(rows) is conversations_of(UTILITY) is UTILITY
    other = tiny_tokenizer()
    other.chat_template += " "
    with pytest.raises(DataError, match=r"expected examples encoded as .* found another chat template; encode"):
        as_encoded(other, rows)
    words = tiny_tokenizer()
    words.get_vocab = lambda: {"other": 0}
    with pytest.raises(DataError, match="found another vocabulary"):
        as_encoded(words, rows)


def test_a_chat_template_that_changed_after_the_encoding_is_refused():
    tokenizer = tiny_tokenizer()
    rows = encode(tokenizer, UTILITY)
    tokenizer.chat_template += " "
    with pytest.raises(DataError, match="found another chat template"):
        as_encoded(tokenizer, rows)


def test_encoded_examples_are_encoded_anew_and_pickled():
    rows = encode(TOKENIZER, UTILITY, max_length=9)
    assert list(encode(TOKENIZER, rows)) == list(encode(TOKENIZER, UTILITY))
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)  # noqa: S301 - our own bytes


@pytest.mark.parametrize("indices", [[], [99], [-99], [True, False], np.array([True]), [1.0], 1])
def test_examples_that_there_are_not_are_refused(indices):
    rows = encode(TOKENIZER, UTILITY)
    with pytest.raises(DataError, match=f"expected indices of {len(rows)} examples"):
        rows.select(indices)
    assert list(rows.select([-1])) == [rows[-1]]
    assert list(rows.select(torch.tensor([1]))) == list(rows.select(np.array([1]))) == [rows[1]]
    with pytest.raises(DataError, match=r"expected a datasets\.Dataset, found str"):
        encode(TOKENIZER, "safety")


@pytest.mark.parametrize("max_length", [0, -5, 1.5, "40"])
def test_a_length_that_is_no_number_of_tokens_is_refused(max_length):
    with pytest.raises(DataError, match="expected max_length to be a whole number from 1 to 1,000,000,000, found "):
        encode(TOKENIZER, UTILITY, max_length=max_length)


def test_a_bad_example_is_found_before_anything_runs():
    rows = conversations(("help", "sure"), ("help", "sure"))
    rows = rows.map(lambda row, index: row if index else {"messages": row["messages"][:1]}, with_indices=True)
    with pytest.raises(DataError, match="example 0: expected an assistant message to take the loss on, found none"):
        encode(TOKENIZER, rows)
