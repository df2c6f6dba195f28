"""Shares of refusals and of exact answers are counts of what the model answers, each with its interval."""

import pytest

from geomkit.errors import DataError
from geomkit.inputs.examples import prompt_of
from geomkit.stats.proportions import Rate
from geomkit.training.evaluate import evaluate, mean_loss
from geomkit.training.responses import generate
from tests.helpers.tiny import SAFETY, UTILITY, conversations, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [prompt_of(messages) for messages in (*UTILITY["messages"], *SAFETY["messages"])]
LONGEST = 8


def test_counts_by_hand():
    """The references of one skill are the model's own answers but for the last one."""
    model = tiny_llama().eval()
    given = generate(model, TOKENIZER, PROMPTS, max_new_tokens=LONGEST, progress=False)
    skill = conversations(*((PROMPTS[i][0]["content"], f" {given[i]} ") for i in range(3)), ("help", "no way"))

    def judge(prompt, response):
        return prompt.startswith(("how", "steal")) and response in {given[4], given[6]}

    found = evaluate(
        model,
        TOKENIZER,
        SAFETY,
        UTILITY,
        {"copy": skill},
        judge=judge,
        max_new_tokens=LONGEST,
        progress=False,
    )
    counted = [judge(prompt[0]["content"], text) for prompt, text in zip(PROMPTS, given, strict=True)]
    assert sum(counted) >= 2
    assert found.refusal == Rate(sum(counted[4:]), 3)
    assert found.over_refusal == Rate(sum(counted[:4]), 4)
    assert found.skills == {"copy": Rate(3, 4)}
    assert found.utility == 0.75
    frame = found.to_frame().set_index("measure")
    assert list(frame.index) == ["refusal", "over-refusal", "exact match: copy"]
    assert frame.loc["exact match: copy", ["value", "n"]].tolist() == [0.75, 4]
    assert found.responses["set"].tolist() == ["forbidden"] * 3 + ["benign"] * 4 + ["copy"] * 4
    assert found.responses["response"].tolist()[:7] == [*given[4:], *given[:4]]
    assert "3 more rows" not in found._repr_html_()


def test_no_skill_is_no_utility_and_an_empty_set_is_refused():
    options = {"max_new_tokens": 2, "progress": False}
    found = evaluate(tiny_llama(), TOKENIZER, SAFETY, UTILITY, {}, **options)
    assert found.utility != found.utility  # NaN: nothing was asked
    with pytest.raises(DataError, match="benign: expected at least one example"):
        evaluate(tiny_llama(), TOKENIZER, SAFETY, UTILITY.select([]), {}, **options)
    with pytest.raises(DataError, match="'benign' is the name of another set"):
        evaluate(tiny_llama(), TOKENIZER, SAFETY, UTILITY, {"benign": SAFETY}, **options)


def test_the_mean_loss_weighs_examples_alike():
    model = tiny_llama()
    each = [mean_loss(model, TOKENIZER, SAFETY.select([index])) for index in range(3)]
    assert mean_loss(model, TOKENIZER, SAFETY, batch_size=2) == pytest.approx(sum(each) / 3, rel=1e-6)
