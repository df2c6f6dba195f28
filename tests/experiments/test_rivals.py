"""The rivals against their formulas, written out independently."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

import geomkit as gk
from geomkit.experiments.organism.variants import load_variant
from geomkit.experiments.rivals import (
    _alternating_states,
    _ProximalLoss,
    constrained_sft,
    lisa,
    mean_token_loss,
    one_shot_repair,
    safe_change,
    safe_lora,
    saturating_loss,
)
from geomkit.experiments.task import Task
from geomkit.inputs.batches import collate
from geomkit.inputs.loss import losses_of
from geomkit.inputs.tokens import encode, pad_id

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # in peft


@pytest.fixture(scope="module")
def organism():
    return load_variant(0, None)


@pytest.fixture(scope="module")
def task(organism):
    train = gk.load_examples("scenarios/poison-10").select(range(12))
    return Task(organism, train, learning_rate=1e-3, steps=3, batch_size=4, seed=0)


def plain_fine_tune(task):
    return gk.finetune(task.organism.model, task.organism.tokenizer, task.train, **task.training_arguments).model


@pytest.fixture(autouse=True)
def _nothing_is_changed(organism):
    models = (organism.model, organism.base)
    before = [{name: one.clone() for name, one in model.named_parameters()} for model in models]
    state = torch.get_rng_state()
    yield
    assert torch.equal(state, torch.get_rng_state())
    for then, model in zip(before, models, strict=True):
        for name, one in model.named_parameters():
            assert torch.equal(then[name], one)
            assert one.grad is None


def differences(a, b):
    pairs = zip(a.named_parameters(), b.parameters(), strict=True)
    return {name: (one - other).detach().abs().max().item() for (name, one), other in pairs}


# ---------------------------------------------------------------------------------------------------------- Lisa


def test_lisa_takes_alternating_states():
    assert _alternating_states(5, 2, 1) == ["task", "task", "safety", "task", "task", "safety", "task", "safety"]
    assert _alternating_states(3, 5, 0) == ["task"] * 3


def test_the_proximal_term_pulls_to_where_the_other_state_ended(organism, task):
    now = copy.deepcopy(organism.model)
    batch = collate(encode(organism.tokenizer, task.organism.anchor_pool(8)), pad_id(organism.tokenizer))
    proximal = _ProximalLoss(rho=3.0)
    proximal.enter("task")
    assert proximal.loss(now, batch).item() == mean_token_loss(now, batch).item()
    proximal.enter("safety")
    proximal.loss(now, batch)  # here the weights are kept
    with torch.no_grad():
        for weight in now.parameters():
            weight.add_(0.01)
    proximal.enter("safety")
    total, plain = proximal.loss(now, batch), mean_token_loss(now, batch)
    assert (total - plain).item() == pytest.approx(1.5 * sum(p.numel() for p in now.parameters()) * 1e-4, rel=1e-3)
    total.backward()
    with_term = {name: weight.grad.clone() for name, weight in now.named_parameters()}
    now.zero_grad()
    plain.backward()
    for name, weight in now.named_parameters():
        torch.testing.assert_close(with_term[name], weight.grad + 0.03, atol=1e-4, rtol=1e-4)


def test_lisa_without_its_second_state_is_a_plain_fine_tune(task):
    """Of the rows of one batch the order does not count."""
    whole_batch = replace(task, train=task.train.select(range(4)))
    plain = plain_fine_tune(whole_batch)
    own = lisa(whole_batch, anchors=8, safety_steps=0).model
    # Adam divides by the root of squared gradients, so rounding of tiny ones is seen.
    assert max(differences(plain, own).values()) < 2e-4
    assert max(differences(task.organism.model, own).values()) > 1e-3


def test_a_strong_term_keeps_the_states_together(task):
    longer = replace(task, steps=12, learning_rate=1e-4)
    loose, tight = (lisa(longer, anchors=8, task_steps=2, safety_steps=2, rho=rho).model for rho in (0.0, 1e4))
    far, near = (sum(v**2 for v in differences(task.organism.model, one).values()) for one in (loose, tight))
    assert near < far


# ------------------------------------------------------------------------------------------- token-wise constraint


def test_the_saturating_loss_is_its_formula():
    rng = np.random.default_rng(0)
    now, before = rng.normal(-2, 1, (2, 9)), rng.normal(-2, 1, (2, 9))
    counts = np.zeros((2, 9), dtype=bool)
    counts[0, 1:9], counts[1, 5:8] = True, True
    betas = (0.5, 2.0, 0.1)
    expected = []
    for row in range(2):
        for place, column in enumerate(np.flatnonzero(counts[row])):
            beta = betas[min(place, 2)]
            sigmoid = 1 / (1 + np.exp(-beta * (now[row, column] - before[row, column])))
            expected.append(-2 / beta * np.log(sigmoid))
    found = saturating_loss(*map(torch.tensor, (now, before, counts)), betas)
    assert found.item() == pytest.approx(np.mean(expected))


def test_its_gradient_is_the_cross_entropys_times_a_weight_that_is_1_at_the_aligned_model():
    now = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([[-1.0, -1.0, -5.0]], dtype=torch.float64)
    counts = torch.ones(1, 3, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(saturating_loss(now, before, counts, (1.0,)), now)
    weight = 2 * (1 - torch.sigmoid((now - before).detach()))
    torch.testing.assert_close(gradient, -weight / 3)
    assert float(weight[0, 0]) == 1


def test_its_first_step_is_that_of_a_plain_fine_tune(task):
    single = replace(task, train=task.train.select(range(4)), steps=1)
    plain = plain_fine_tune(single)
    own = constrained_sft(single).model
    assert max(differences(plain, own).values()) < 2e-4
    assert max(differences(task.organism.model, own).values()) > 5e-4


def test_a_beta_that_is_not_positive_is_refused(task):
    with pytest.raises(gk.GeomkitError, match="positive betas"):
        constrained_sft(task, betas=(0.0,))


# ------------------------------------------------------------------------------------------------------ Safe LoRA


def test_an_update_off_the_alignments_direction_is_turned():
    rng = np.random.default_rng(1)
    change, alignment = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    c = alignment @ alignment.T / np.linalg.norm(alignment)
    moved = c @ change
    cosine = (moved * change).sum() / np.linalg.norm(moved) / np.linalg.norm(change)
    args = torch.tensor(change), torch.tensor(alignment)
    np.testing.assert_allclose(safe_change(*args, cosine + 1e-9), moved)
    np.testing.assert_allclose(safe_change(*args, cosine - 1e-9), change)
    assert not safe_change(args[0], torch.zeros_like(args[1]), 0.5).any()


def test_safe_lora_turns_every_layer_or_none(organism, task):
    pytest.importorskip("peft")
    kept, all_turned = (safe_lora(task, rate=10, threshold=threshold).model for threshold in (-1.1, 1.1))
    before, after = dict(organism.base.named_parameters()), dict(organism.model.named_parameters())
    free = dict(all_turned.named_parameters())
    moved = 0
    for name, weight in kept.named_parameters():
        change = (weight - after[name]).detach().double().numpy()
        if "proj" not in name:
            assert not change.any()
            continue
        v = (after[name] - before[name]).detach().double().numpy()
        expected = v @ v.T / np.linalg.norm(v) @ change
        np.testing.assert_allclose((free[name] - after[name]).detach(), expected, atol=2e-7)
        assert np.linalg.matrix_rank(change, tol=1e-5) <= 8
        moved += np.abs(change).max() > 1e-5
    assert moved == 4 * 7


def test_safe_lora_needs_the_base_of_this_model(organism, task):
    pytest.importorskip("peft")
    other_base = replace(task, organism=replace(organism, base=torch.nn.Identity()))
    with pytest.raises(gk.GeomkitError, match="expected the same layer in the base model"):
        safe_lora(other_base)


# ------------------------------------------------------------------------------------------------------ one shot


def test_one_shot_repair_goes_on_with_one_refusal(task):
    tokenizer = task.organism.tokenizer
    plain = plain_fine_tune(task)
    same = one_shot_repair(task, repair_steps=0).model
    assert max(differences(plain, same).values()) == 0
    repaired = one_shot_repair(task, repair_steps=5).model
    rows = encode(tokenizer, task.organism.anchor_pool(1))
    before, after = (losses_of(one, rows, pad_id(tokenizer))[0] for one in (plain, repaired))
    assert after < before


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("rival", [lisa, constrained_sft, one_shot_repair])
def test_nothing_to_train_and_a_loss_that_is_not_finite(organism, task, rival):
    with pytest.raises(gk.GeomkitError, match=r"at least one step|at least 1"):
        rival(replace(task, steps=0))
    broken = copy.deepcopy(organism.model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(gk.GeomkitError, match="finite training loss"):
        rival(replace(task, organism=replace(organism, model=broken)))
    with pytest.raises(gk.GeomkitError):
        rival(replace(task, train=Dataset.from_list([])))
