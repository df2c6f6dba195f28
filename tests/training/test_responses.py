"""A model's responses are those of a greedy loop, whatever the batch, and the model is left as found."""

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from geomkit.errors import DataError
from geomkit.inputs.examples import prompt_of
from geomkit.training import responses as module
from geomkit.training.judges import Verdict
from geomkit.training.responses import generate, own_refusals
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

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
