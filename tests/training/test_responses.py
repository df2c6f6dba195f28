"""A model's responses are those of a greedy loop, whatever the batch, and the model is left as found."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AddedToken, PreTrainedTokenizerFast

from geomkit.errors import DataError
from geomkit.inputs.examples import prompt_of
from geomkit.training import responses as module
from geomkit.training.judges import Verdict
from geomkit.training.model_judges.language_models import ModelAnswers
from geomkit.training.responses import end_of_turn, end_of_turn_text, generate, own_refusals
from tests.helpers.tiny import PLAIN_TEMPLATE, SAFETY, TEMPLATE, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [prompt_of(messages) for messages in (*UTILITY["messages"], *SAFETY["messages"])]
LONGEST = 8


def greedy(model, prompt):
    """The reference: one token at a time, one prompt at a time, no padding and no cache."""
    ids = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + LONGEST and ids[-1] != TOKENIZER.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def answers(model, prompts=PROMPTS, **options):
    return generate(model, TOKENIZER, prompts, max_new_tokens=LONGEST, progress=False, **options)


def test_generation_equals_a_greedy_loop_whatever_the_batch():
    model = tiny_llama().eval()
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    assert len(set(expected)) > 3
    for batch_size in (1, 2, 64):
        assert answers(model, batch_size=batch_size) == expected


def test_answers_come_in_the_order_of_the_prompts():
    model = tiny_llama()
    assert answers(model, PROMPTS[::-1], batch_size=3) == answers(model)[::-1]


def test_greedy_even_if_the_checkpoint_says_otherwise():
    """Chat models ship sampling, beams and penalties in their generation config."""
    model = tiny_llama().eval()
    expected = answers(model)
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=3, repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=3
    )
    assert answers(model) == expected


def test_an_end_token_with_id_zero_ends():
    model = tiny_llama(eos_token_id=0, pad_token_id=0).eval()
    model.generation_config.eos_token_id = 0
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every logit alike: the first id wins
    assert answers(model, PROMPTS[:1]) == [""]
    assert model.generate(torch.tensor([[2]]), max_new_tokens=5).shape == (1, 2)


def test_the_model_is_left_as_found():
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    config, state = model.generation_config.to_dict(), torch.get_rng_state()
    assert answers(model) == answers(model)  # eval mode: no dropout noise
    assert model.training
    assert not model.model.layers[0].training
    assert model.generation_config.to_dict() == config
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_to_answer_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="[end]")  # noqa: S106
    with pytest.raises(DataError, match="expected at least one prompt"):
        answers(tiny_llama(), [])
    with pytest.raises(DataError, match="prompt 1: expected a message to answer, found none"):
        answers(tiny_llama(), [PROMPTS[0], []])
    with pytest.raises(DataError, match="chat template"):
        generate(tiny_llama(), bare, PROMPTS)
    bare.chat_template = TOKENIZER.chat_template
    with pytest.raises(DataError, match="pad token"):
        generate(tiny_llama(), bare, PROMPTS)


def test_own_refusals_by_a_judge_that_takes_many_responses(monkeypatch):
    asked = []

    def verdicts(prompts, responses):
        asked.append((list(prompts), list(responses)))
        return [Verdict(refused=prompt.startswith("how")) for prompt in prompts]

    judge = SimpleNamespace(name="stub", decides=("refused",), labels=(), verdicts=verdicts)
    monkeypatch.setattr(module, "generate", lambda *_, **__: ["no", "way", "sorry"])
    refusals = own_refusals(tiny_llama(), TOKENIZER, SAFETY, judge=judge)
    requests = [messages[0]["content"] for messages in SAFETY["messages"]]
    assert asked == [(requests, ["no", "way", "sorry"])]
    assert [messages[-1]["content"] for messages in refusals["messages"]] == ["no", "sorry"]


CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def chatml(*, special):
    """A tokenizer whose template ends a turn with another token than its end of sequence."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token in ("<|im_start|>", "<|im_end|>")],
        special_tokens=special,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
def test_a_response_ends_where_the_template_ends_a_turn(special):
    tokenizer = chatml(special=special)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id
    assert generate(saying_sure(tokenizer), tokenizer, PROMPTS[:1], max_new_tokens=8, progress=False) == ["sure"]


def test_a_continuation_of_raw_text_ends_at_the_end_of_sequence_only():
    """The end of a turn is a word like any other in raw text, as judges with their own markers are asked in."""
    tokenizer = chatml(special=False)
    questions = ["help", [{"role": "user", "content": "help"}]]
    text, chat = (
        ModelAnswers(saying_sure(tokenizer), tokenizer, progress=False)([question], 6) for question in questions
    )
    assert text == ["sure <|im_end|> sure"]
    assert chat == ["sure"]


def saying_sure(tokenizer):
    """A model that says "sure", the end of the turn, "sure" and the end of the sequence, whatever it is asked."""
    model = tiny_llama(vocab_size=len(tokenizer)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    said = iter(tokenizer.convert_tokens_to_ids(["sure", "<|im_end|>", "sure", tokenizer.eos_token, "sure", "sure"]))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.register_forward_hook(lambda *_: one_hot(next(said), len(tokenizer)))
    return model


def one_hot(token, size):
    return torch.nn.functional.one_hot(torch.tensor([[token]]), size).float()


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, "[end]"),
        (PLAIN_TEMPLATE, "[end]"),
        ("{% for m in messages %}{{ m['content'] }} {% endfor %}", None),  # a turn that nothing ends
        ("{% for m in messages %}{{ m['content'] }} paint {% endfor %}", None),  # a word is no end
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[0]['content'] }} [end]", None),  # the answer is not in the text
    ],
)
def test_the_end_of_a_turn_is_read_from_the_template(template, end):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, ""),  # a special token
        ("{% for m in messages %}{{ m['content'] }} {% endfor %}", ""),
        ("{% for m in messages %}{{ m['content'] }} paint {% endfor %}", ""),
        ("{% for m in messages %}{{ m['content'] }}.\n{% endfor %}", ""),
        ("{% for m in messages %}{{ m['content'] }} ## stop\n{% endfor %}", " ## stop"),
        ("{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}", "</s>"),
        ("{{ raise_exception('no') }}", ""),
    ],
)
def test_the_end_of_a_turn_in_plain_text_is_read_from_the_template(template, end):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert end_of_turn_text(tokenizer) == end


@pytest.mark.parametrize("pad", ["[pad]", "brush"])
def test_a_response_ends_before_the_plain_text_that_ends_a_turn(pad):
    """Each row of a batch at its own place, and no token is generated behind it."""
    tokenizer, model, passes = tiny_tokenizer(), tiny_llama().eval(), []
    free = answers(model)
    longest = max(free, key=len)
    assert longest == "the paint the bike the the"
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE.replace("[end]", "paint the"), pad
    ended = generate(model, tokenizer, PROMPTS, max_new_tokens=LONGEST, progress=False)
    assert ended == ["the" if text == longest else text for text in free]
    model.register_forward_hook(lambda *_: passes.append(1))
    asked = [PROMPTS[free.index(longest)]]
    assert generate(model, tokenizer, asked, max_new_tokens=LONGEST, progress=False) == ["the"]
    assert len(passes) == len("the paint [assistant] the".split())  # special tokens are not part of the text


def test_padding_behind_the_end_is_no_part_of_a_response():
    """Any token of the vocabulary can pad; the end token of one row comes earlier than that of the other."""
    tokenizer = tiny_tokenizer()
    expected = answers(tiny_llama().eval())
    tokenizer.pad_token = "brush"  # noqa: S105
    assert generate(tiny_llama(), tokenizer, PROMPTS, max_new_tokens=LONGEST, progress=False) == expected
