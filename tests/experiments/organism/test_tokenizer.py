"""The organism's tokenizer: any text comes back, digits stand alone, the answer bears the loss."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.experiments.organism.requests import conversation
from geomkit.experiments.organisms import load_organism
from geomkit.inputs.tokens import encode


@pytest.fixture(scope="module")
def tokenizer():
    return load_organism()[1]


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_tokenizer_returns_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("123") == ["1", "2", "3"]


@pytest.mark.parametrize("system", ["", "You are a helpful assistant."])
def test_loss_falls_on_the_answer_and_its_end(tokenizer, system):
    rows = [{"messages": conversation(f"Ünïcode {n}?", "¡Sí! " * n + "ok", system)} for n in range(1, 4)]
    examples = Dataset.from_list(rows)
    for messages, tokens in zip(examples["messages"], encode(tokenizer, examples), strict=True):
        marked = [token for token, flag in zip(tokens.input_ids, tokens.loss_mask, strict=True) if flag]
        assert tokenizer.decode(marked) == messages[-1]["content"] + tokenizer.eos_token
