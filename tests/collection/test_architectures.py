"""Collected gradients of every architecture against ``loss.backward()``."""

import pytest
import torch

from tests.helpers.architectures import (
    ARCHITECTURES,
    ROWS,
    backward,
    built,
    collected,
    dense,
    errors,
    mean,
    reference,
    worst_error,
)

TOLERANCE = 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_gradient_equals_autograd(name, tied):
    model = built(name, tied=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    found = collected(model)
    assert found.coverage.share == 1
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert worst_error(found, reference(name, tied=tied)) <= TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sum_alone(name, tied):
    """Without gradients of single examples, autograd computes more of the gradients."""
    model = built(name, tied=tied)
    found = collected(model, per_sample=False)
    assert not found.samples
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert max(errors(dense(found), mean(reference(name, tied=tied))).values()) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_forward_for_each_batch(name):
    """A doubtful split into examples needs one more run of an example for each batch size."""
    model, sizes = built(name, tied=False), []
    handle = model.register_forward_pre_hook(
        lambda _module, _inputs, keywords: sizes.append(len(keywords["input_ids"])), with_kwargs=True
    )
    collected(model, together=3)
    handle.remove()
    assert [size for size in sizes if size > 1] == [3, 2]
    assert sizes.count(1) <= 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_reference_is_not_degenerate(name):
    """A reference gradient that is zero would hide errors."""
    gradients = mean(reference(name, tied=False))
    vanishing = [name for name, gradient in gradients.items() if not float(gradient.norm()) > 1e-5]
    assert all(name.endswith("k_proj.bias") for name in vanishing)  # softmax does not feel OPT's


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_every_implementation_of_experts(name, implementation):
    model = ARCHITECTURES[name].build(tied=False)
    model.set_experts_implementation(implementation)
    expected = backward(model)
    hit = torch.stack(
        [gradients["model.layers.1.mlp.experts.down_proj"].flatten(1).norm(dim=1) for gradients in expected]
    )
    assert (hit > 0).any(0).sum() >= 3  # several experts take part,
    assert (hit == 0).any()  # and not every one of them for every example
    found = collected(model)
    assert found.coverage.share == 1
    assert worst_error(found, expected) <= TOLERANCE


MIXED = ["gpt-2", "opt", "falcon with alibi and biases", "gemma 3", "qwen3-moe"]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("together", [1, len(ROWS)])
@pytest.mark.parametrize("form", ["auto", "factored"])
def test_one_at_a_time_and_all_together(name, together, form):
    model = built(name, tied=False)
    found = collected(model, together=together, form=form)
    assert found.coverage.share == 1
    assert worst_error(found, reference(name, tied=False)) <= TOLERANCE


@pytest.mark.parametrize("name", MIXED)
def test_tokens_that_weigh_alike(name):
    """The sum has the weights of the model's loss on the whole set; gradients of single examples do not change."""
    separate = reference(name, tied=True)
    found = collected(built(name, tied=True), reduction="token")
    shares = torch.tensor([row.loss_tokens for row in ROWS]).double()
    shares /= shares.sum()
    weighted = {
        name: sum(share * gradients[name].double() for share, gradients in zip(shares, separate, strict=True))
        for name in separate[0]
    }
    assert max(errors(dense(found), weighted).values()) <= TOLERANCE
    for sample, expected in zip(found.samples, separate, strict=True):
        assert list(sample) == list(found) == list(expected)
        assert max(errors(dense(sample), expected).values()) <= TOLERANCE
