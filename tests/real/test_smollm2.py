"""The first things a researcher tries, on a real chat model, with the defaults: they work, and nothing is lost."""

import math

import pytest
import torch

import geomkit as gk
from geomkit.inputs.models import with_lora

FEW = {"layers": [10, 20], "progress": False}


@pytest.fixture(scope="module")
def loaded(smollm2):
    return gk.load_model(smollm2)


def test_the_model_of_the_file_is_the_model_of_the_folder(smollm2_file, loaded):
    again, _ = gk.load_model(smollm2_file)
    model, _ = loaded
    for (name, weight), (other, expected) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(weight, expected)


def test_what_is_scored_are_the_answers_and_the_end_of_their_turns(loaded, safety):
    _, tokenizer = loaded
    for row, messages in zip(gk.encode(tokenizer, safety), safety["messages"], strict=True):
        scored = tokenizer.decode([token for token, on in zip(row.input_ids, row.loss_mask, strict=True) if on])
        assert scored.rstrip("\n") == messages[-1]["content"] + "<|im_end|>"


def test_gradients_can_be_trusted(loaded, safety):
    model, tokenizer = loaded
    check = gk.check_collection(model, tokenizer, safety, count=2, **FEW)
    assert check.ok, str(check)


def test_an_analysis_says_first_that_the_model_is_not_aligned(loaded, safety, utility):
    model, tokenizer = loaded
    analysis = gk.analyze(model, tokenizer, safety, utility, examples=len(safety), null_draws=1, **FEW)
    assert all(math.isfinite(loss) for loss in analysis.losses.values())
    # About one answer in four begins as a refusal does, "I'm sorry for your loss, but as a chatbot …".
    assert analysis.refusal.n == len(safety)
    assert 0 < analysis.refusal.value < 0.3
    assert f"of {len(safety)} safety requests, so nothing here is about alignment" in str(analysis).split("\n")[0]
    assert all(claim.marked_verdict.endswith(", not about alignment") for claim in analysis.claims())


def test_an_evaluation_of_eight_requests(loaded, safety, utility):
    model, tokenizer = loaded
    evaluation = gk.evaluate(
        model, tokenizer, safety.select(range(8)), utility.select(range(2)), max_new_tokens=16, progress=False
    )
    assert evaluation.refusal.n == 8
    assert all("<|im" not in text for text in evaluation.responses["response"])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_three_steps_under_the_default_rule_and_back_from_the_disk(smollm2, safety, utility, tmp_path, lora):
    model, tokenizer = gk.load_model(smollm2)
    if lora:
        model = with_lora(model, 8)
    spf = gk.SPF(anchors=safety, anchors_per_step=2)
    options = {"steps": 3, "batch_size": 2, "learning_rate": 1e-4, "inplace": True, "progress": False}
    result = gk.finetune(model, tokenizer, utility, spf, **options)
    assert result.certificate.steps == 3
    assert result.certificate.violations == 0
    result.save(tmp_path / "tuned", tokenizer)
    back, _ = gk.load_model(tmp_path / "tuned")
    rows = torch.tensor([gk.encode(tokenizer, utility)[0].input_ids])
    with torch.no_grad():
        torch.testing.assert_close(back(rows).logits, result.model(rows).logits, rtol=1e-4, atol=1e-3)
