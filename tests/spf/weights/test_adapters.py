"""LoRA: what is protected is the product BA, on the merged weight; DoRA is protected factor by factor."""

import copy

import numpy as np
import pytest
import torch

from geomkit.errors import SPFError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.spf.rule import Rule
from geomkit.spf.settings import SPF
from geomkit.spf.weights.blocks import ProductBlock
from tests.helpers.forms import seeded
from tests.helpers.spf_training import TOKENIZER, anchors_loss, run, task_loss
from tests.helpers.tiny import SAFETY, tiny_llama

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def adapted(seed=1, started=True, **settings):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and started:  # a fresh adapter's product is zero
                    parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def merged(model):
    """Every weight of the plain model that the adapters are merged into."""
    return {name: one.double() for name, one in copy.deepcopy(model).merge_and_unload().named_parameters()}


def merged_gradients(model):
    plain = copy.deepcopy(model).merge_and_unload().eval().requires_grad_(True)
    parameters = dict(plain.named_parameters())
    found = torch.autograd.grad(anchors_loss(plain), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


OPTIMIZERS = {"sgd": lambda p: torch.optim.SGD(p, lr=0.5), "adamw": lambda p: torch.optim.AdamW(p, lr=0.05)}


def changes(rule, optimizer, steps=4, **settings):
    """⟨ΔW, G⟩ of each merged weight and step, and the certificate."""
    model, seen, found = adapted(**settings), {}, []

    def watch(when, model):
        if when == "before":
            seen.update(gradients=merged_gradients(model), weights=merged(model))
            return
        after = merged(model)
        moved = {name: after[name] - seen["weights"][name] for name in after}
        found.append({n: float((moved[n] * seen["gradients"][n].double()).sum()) for n in moved if moved[n].any()})

    certificate = run(
        model, SPF(SAFETY, rule=rule, tokenizer=TOKENIZER, drift_correction=False), OPTIMIZERS[optimizer],
        steps=steps, watch=watch,
    )  # fmt: skip
    return found, certificate


@pytest.mark.parametrize("rule", ["rank1", "left", "two-sided"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("started", [True, False], ids=["B at random", "B zero"])
def test_no_merged_weight_moves_against_safety(rule, optimizer, started):
    """Steps so long that ΔB ΔA matters: ⟨ΔW, G⟩ ≤ 0 for the merged weight all the same, to 5e-6:
    merging rounds to fp32."""
    found, certificate = changes(rule, optimizer, started=started)
    assert certificate.violations == 0
    for step, record in zip(found, certificate.records, strict=True):
        assert len(step) == 6  # q, v and down of two layers
        assert max(step.values()) < 5e-6
        assert sum(step.values()) == pytest.approx(record.first_order, abs=1e-5)
    assert any(record.fired > 0 for record in certificate.records)


def test_a_plain_run_moves_merged_weights_against_safety():
    found, certificate = changes("monitor", "adamw")
    assert max(max(step.values()) for step in found) > 1e-3
    assert certificate.violations > 0


def test_factor_by_factor_the_promise_would_hold_to_first_order_only():
    """Why the product is one block: the same rule on A and B alone leaves ⟨ΔB ΔA, G⟩."""
    found, _ = changes("rank1", "adamw", target_modules=["q_proj"], use_dora=False)
    assert max(max(step.values()) for step in found) < 5e-6
    apart = Rule("rank1", "gradient", "block", "rank1")
    loose, _ = changes(apart, "sgd", target_modules=["q_proj"])
    assert max(max(step.values()) for step in loose) > 1e-5


def test_dora_holds_to_first_order_in_its_own_parameters():
    model = adapted(use_dora=True)
    certificate = run(model, SPF(SAFETY, rule="kl-left", tokenizer=TOKENIZER), OPTIMIZERS["adamw"], steps=3)
    assert certificate.violations == 0
    assert {name.split(".")[-2] for name in certificate.records[0].blocks} >= {"default"}
    assert any("lora_magnitude_vector" in name for name in certificate.records[0].blocks)
    assert any(record.fired > 0 for record in certificate.records)


def test_other_trained_parameters_stand_beside_the_products():
    model = adapted(modules_to_save=["lm_head"])
    certificate = run(model, SPF(SAFETY, tokenizer=TOKENIZER), OPTIMIZERS["adamw"], steps=2)
    blocks = certificate.records[0].blocks
    assert sum("base_layer.weight" in name for name in blocks) == 6
    assert sum("modules_to_save" in name for name in blocks) == 1
    assert certificate.violations == 0


def test_the_frozen_weights_stay_frozen_and_as_they_were():
    model = adapted()
    frozen = {name: one.clone() for name, one in model.named_parameters() if not one.requires_grad}
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    run(model, SPF(SAFETY, tokenizer=TOKENIZER), OPTIMIZERS["adamw"], steps=2)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == trained
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], one) for name, one in frozen.items())
    assert all(now[name].grad is None for name in frozen)


def test_an_adapter_swapped_in_mid_run_ends_the_run():
    """The optimizer still holds the old one: a guard that went on would certify what nobody uses."""
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    with SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer):
        task_loss(model).backward()
        optimizer.step()
        model.set_adapter("other")
        task_loss(model).backward()
        with pytest.raises(SPFError, match="after changing adapters build a new optimizer"):
            optimizer.step()


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_a_product_reads_and_moves_as_its_matrix_does(form):
    """Against numpy on the formed matrix s·BA; moves lie in the row space of A."""
    generator = seeded(4)
    first, second = torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator)
    gradient = FactoredGradient(torch.randn(5, 6, generator=generator), torch.randn(5, 8, generator=generator))
    if form == "dense":
        gradient = DenseGradient(gradient.dense(), 5)
    matrix = lambda: 2.0 * second.double().numpy() @ first.double().numpy()  # noqa: E731
    block = ProductBlock([(second, first, 2.0)])
    before, dense = matrix(), gradient.dense().double().numpy()
    left, right = torch.randn(2, 6, generator=generator), torch.randn(8, 2, generator=generator)
    np.testing.assert_allclose(block.left_times(left).numpy(), left.double().numpy() @ before, atol=1e-6)
    np.testing.assert_allclose(block.times(right).numpy(), before @ right.double().numpy(), atol=1e-6)
    assert block.dot(gradient) == pytest.approx((before * dense).sum(), rel=1e-6)
    projector = np.linalg.pinv(first.double().numpy()) @ first.double().numpy()
    np.testing.assert_allclose(block.reachable(gradient).dense().numpy(), dense @ projector, atol=1e-5)
    block.apply([(gradient, -0.5)])
    np.testing.assert_allclose(matrix() - before, -0.5 * dense @ projector, atol=1e-5)


def test_mixing_adds_the_safety_gradient_of_both_factors():
    """By the chain rule through BA, against autograd; relative to the largest entry, fp32."""
    model = adapted(modules_to_save=["lm_head"])
    expected, parameters = copy.deepcopy(model).eval(), dict(model.named_parameters())
    (task_loss(expected) + 0.5 * anchors_loss(expected)).backward()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.0)
    with SPF(SAFETY, rule="mixed-left", mix=0.5, anchors_per_step=len(SAFETY), tokenizer=TOKENIZER).attach(
        model, optimizer
    ):
        task_loss(model).backward()
        optimizer.step()
    for name, wanted in expected.named_parameters():
        found = parameters[name].grad
        assert (found is None) == (wanted.grad is None), name
        if found is not None:
            torch.testing.assert_close(found, wanted.grad, rtol=0, atol=1e-5 * float(wanted.grad.abs().max()))
