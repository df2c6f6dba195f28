"""Spans of characters become tokens: by offsets, or by prefixes for tokenizers that do not know where tokens stand."""

import pytest

from geomkit.errors import DataError
from geomkit.inputs.token_spans import check_spans, mask_of_spans
from geomkit.inputs.tokens import encode
from tests.helpers.chat import byte_tokenizer, dialogue, scored_texts, shipped_template

TURNS = dialogue("Hi", "Hello.", "Go", "Bye.")


def slow(tokenizer):
    """Make a tokenizer one that does not know where its tokens stand."""

    class Slow(type(tokenizer)):
        is_fast = False

    tokenizer.__class__ = Slow
    return tokenizer


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "phi3"])
def test_a_slow_tokenizer_gives_the_tokens_of_a_fast_one(name):
    fast, other = byte_tokenizer(shipped_template(name)), slow(byte_tokenizer(shipped_template(name)))
    assert list(encode(other, TURNS)) == list(encode(fast, TURNS))


def test_a_slow_tokenizer_cannot_follow_markers_and_falls_back():
    tokenizer = slow(byte_tokenizer(shipped_template("llama3_training")))
    with pytest.raises(DataError, match=r"expected a fast tokenizer, .* found Slow; .*--assistant-mask prefix"):
        encode(tokenizer, TURNS, assistant_mask="template")
    rows = encode(tokenizer, TURNS)
    assert rows.assistant_mask == "prefix"
    assert scored_texts(tokenizer, rows[0]) == ["Hello.<|eot_id|>", "Bye.<|eot_id|>"]


def masked(tokenizer, text, first, end):
    ids, mask = mask_of_spans(tokenizer, text, [(first, end)])
    return tokenizer.decode([token for token, inside in zip(ids, mask, strict=True) if inside])


def test_a_token_that_joins_the_space_before_an_answer_to_its_first_word_belongs_to_it():
    """The tokenizers of Llama 2 and Mistral write ``▁Hello`` as one token, where markers stand behind the space."""
    tokenizer = byte_tokenizer("x", merges=(("Ġ", "H"), ("Ċ", "Ċ"), (":", "B")))
    assert masked(tokenizer, "Hi Hello.", 3, 9) == " Hello."
    assert masked(tokenizer, "Hi\n\nHello.", 3, 10) == "Hello."  # white space alone is joined to what stands before
    assert masked(tokenizer, "Hi:Bye.", 3, 7) == "ye."  # a word that is joined to the header is no token of the answer


def test_tokens_before_an_answer_that_are_not_those_of_the_prompt_are_refused():
    tokenizer = byte_tokenizer("x", merges=((":", "B"),))
    ids, mask = mask_of_spans(tokenizer, "Hi:Bye.", [(3, 7)])
    with pytest.raises(DataError, match=r"the tokenizer joins the end of the prompt 'Hi:' to the answer 'Bye.'"):
        check_spans(tokenizer, "Hi:Bye.", [(3, 7)], ids, mask)
    with pytest.raises(DataError, match="the tokenizer joins the end of the prompt"):
        mask_of_spans(slow(tokenizer), "Hi:Bye.", [(3, 7)])


def test_a_mask_that_leaves_out_a_part_of_an_answer_is_refused():
    tokenizer = byte_tokenizer("x")
    ids, mask = mask_of_spans(tokenizer, "Hi:Bye.", [(3, 7)])
    check_spans(tokenizer, "Hi:Bye.", [(3, 7)], ids, mask)
    with pytest.raises(DataError, match=r"expected tokens that spell the answer 'Bye.', found 'Bye'; add"):
        check_spans(tokenizer, "Hi:Bye.", [(3, 7)], ids, [*mask[:-1], False])
