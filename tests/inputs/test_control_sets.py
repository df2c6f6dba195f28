"""Control sets keep texts, turns or token counts of a set, on the organism's tokenizer and on another."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from geomkit.errors import DataError
from geomkit.experiments.organisms import load_organism
from geomkit.inputs.control_sets import derangement, random_tokens, shuffled_pairs, with_responses
from geomkit.inputs.examples import load_examples, prompt_of, required_final_answer
from geomkit.inputs.tokens import encode
from geomkit.training.responses import own_responses
from tests.helpers.tiny import SAFETY, UTILITY, conversations, tiny_llama, tiny_tokenizer


def prompts(examples):
    return [prompt_of(messages) for messages in examples["messages"]]


def responses(examples):
    return [required_final_answer(messages) for messages in examples["messages"]]


def test_responses_are_put_under_prompts_in_turn():
    result = with_responses(UTILITY, SAFETY)
    assert prompts(result) == prompts(UTILITY)
    assert responses(result) == [*responses(SAFETY), responses(SAFETY)[0]]


# ---------------------------------------------------------------------------------------------------- shuffled


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=30), st.integers(0, 100))
def test_no_place_keeps_its_text_and_none_is_lost(texts, seed):
    if 2 * max(map(texts.count, texts)) > len(texts):
        with pytest.raises(DataError, match="expected responses that differ"):
            derangement(texts, Random(seed))
        return
    dealt = derangement(texts, Random(seed))
    assert sorted(dealt) == sorted(texts)
    assert all(mine != text for mine, text in zip(dealt, texts, strict=True))


def test_every_other_place_is_as_likely():
    places = [derangement("abcd", Random(seed)).index("a") for seed in range(3000)]
    assert [places.count(place) / 3000 for place in range(4)] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.03)


def test_shuffled_pairs_keep_prompts_and_responses_apart():
    result = shuffled_pairs(UTILITY, seed=3)
    assert prompts(result) == prompts(UTILITY)
    assert sorted(responses(result)) == sorted(responses(UTILITY))
    assert responses(result) == responses(shuffled_pairs(UTILITY, seed=3))
    with pytest.raises(DataError, match=r"found one text in 64 of 64 examples; .*with_responses"):
        shuffled_pairs(load_examples("safety"))


# ----------------------------------------------------------------------------------------------- random tokens


@pytest.mark.parametrize("examples", ["utility", "eval/arithmetic", "scenarios/identity-shift"])
def test_random_tokens_keep_every_place_of_the_loss(examples):
    _, tokenizer = load_organism()
    rows = load_examples(examples).select(range(10))
    result = random_tokens(rows, tokenizer, seed=1)
    wanted, drawn = encode(tokenizer, rows), encode(tokenizer, result)
    assert [tokens.loss_mask for tokens in drawn] == [tokens.loss_mask for tokens in wanted]
    assert not set(responses(result)) & set(responses(rows))
    assert responses(result) == responses(random_tokens(rows, tokenizer, seed=1))
    assert responses(result) != responses(random_tokens(rows, tokenizer, seed=2))


def test_random_tokens_serve_other_tokenizers_system_turns_and_empty_ones():
    tokenizer = tiny_tokenizer()
    result = random_tokens(conversations(("how do i", "sure"), ("", "no way")), tokenizer)
    assert [len(text.split()) for row in result["messages"] for text in (row[0]["content"], row[1]["content"])] == [
        3,
        1,
        0,
        2,
    ]
    assert random_tokens(encode(tokenizer, SAFETY, assistant_mask="prefix"), tokenizer)[0]["messages"]


def test_random_tokens_say_what_stands_in_the_way():
    tokenizer = tiny_tokenizer()
    odd = "[user] {% if 'steal the bike' in m['content'] %}[end] {% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("[user] ", odd)
    with pytest.raises(DataError, match=r"example 0: expected random words with its .* tokens, found none in 50 draws"):
        random_tokens(conversations(("how do i steal the bike", "no")), tokenizer)
    digits = Tokenizer(models.WordLevel({"1": 0, "2": 1}, unk_token="2"))  # noqa: S106
    digits.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wordless = PreTrainedTokenizerFast(tokenizer_object=digits, chat_template=tokenizer.chat_template)
    with pytest.raises(DataError, match="expected a tokenizer with tokens that are words"):
        random_tokens(conversations(("1", "1")), wordless)


# ------------------------------------------------------------------------------------------------ own responses


def test_own_responses_are_what_the_model_says():
    model, tokenizer = load_organism()
    rows = load_examples("safety").select(range(4))
    result = own_responses(model, tokenizer, with_responses(rows, load_examples("utility")), progress=False)
    assert list(result["messages"]) == list(rows["messages"])


def test_a_silent_model_is_said():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.lm_head.weight.data.zero_()
    model.generation_config.eos_token_id = 0  # every logit is equal, and the first wins
    with pytest.raises(DataError, match="found none to 3 of them, the first in example 0"):
        own_responses(model, tokenizer, SAFETY, progress=False)


@pytest.mark.parametrize(
    ("examples", "message"), [("x.jsonl", "found str; make one"), (SAFETY.select([]), "found an empty set")]
)
def test_what_is_no_set_of_examples_is_refused(examples, message):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    for make in (
        lambda: shuffled_pairs(examples),
        lambda: with_responses(SAFETY, examples),
        lambda: with_responses(examples, SAFETY),
        lambda: own_responses(model, tokenizer, examples, progress=False),
        lambda: random_tokens(examples, tokenizer),
    ):
        with pytest.raises(DataError, match=message):
            make()
