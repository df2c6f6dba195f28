"""Where anchors come from, when they are measured, and what measuring leaves alone."""

import copy

import pytest
import torch

import geomkit as gk
from geomkit.errors import DataError
from geomkit.inputs.batches import collate
from geomkit.inputs.loss import example_losses
from geomkit.inputs.tokens import encode
from geomkit.spf import constraints as meters
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.kl import ReferenceModel
from geomkit.spf.settings import SPF
from geomkit.training.finetune import finetune
from geomkit.training.losses import mean_loss
from tests.helpers.spf_training import TOKENIZER, anchors_loss, run, safety_gradients, task_loss
from tests.helpers.tiny import CONTROL, SAFETY, conversations, tiny_llama


def sgd(rate=0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


@pytest.fixture
def passes(monkeypatch):
    """The anchors of every pass over them."""
    seen, collect = [], meters.collect_from_tokens

    def counted(model, rows, *rest, **settings):
        seen.append(len(rows))
        return collect(model, rows, *rest, **settings)

    monkeypatch.setattr(meters, "collect_from_tokens", counted)
    return seen


def test_draws_depend_on_seed_and_step_only():
    pool = AnchorPool(tuple(range(20)), per_step=4, seed=1)
    assert pool.draw(3) == pool.draw(3)
    assert pool.draw(3) != pool.draw(4)
    assert AnchorPool(pool.rows, 4, seed=2).draw(3) != pool.draw(3)
    assert list(AnchorPool(pool.rows, 99).draw(0)) == list(range(20))


def test_anchors_are_measured_every_so_many_steps(passes):
    certificate = run(
        tiny_llama(), SPF(SAFETY, rule="mixed-left", tokenizer=TOKENIZER, refresh_every=3), sgd(), steps=7
    )
    assert len(passes) == 3
    assert [record.fresh for record in certificate.records] == [True, False, False, True, False, False, True]
    assert certificate.violations == 0  # of the gradient that was measured


def test_a_subspace_is_computed_anew_when_it_holds_less_than_it_did(monkeypatch):
    from geomkit.spf.projection import protection

    made, compute = [], protection.with_subspaces
    monkeypatch.setattr(protection, "with_subspaces", lambda *a: (made.append(a[2]), compute(*a))[1])
    counts = {}
    for share in (None, 0.9, 1e-9):
        made.clear()
        spf = SPF(SAFETY, rule="left", rank=2, tokenizer=TOKENIZER, refresh_energy=share)
        certificate = run(tiny_llama(), spf, sgd(0.05), steps=6)
        assert certificate.violations == 0
        counts[share] = len(made)
    blocks = len(set(made))
    assert counts[None] == 6 * blocks
    assert counts[1e-9] == blocks
    assert blocks < counts[0.9] < counts[None]


def test_own_refusals_keeps_what_the_model_refuses(organism):
    model, tokenizer = organism
    mixed = (
        gk.load_examples("eval/forbidden").select(range(2)).to_list()
        + gk.load_examples("eval/benign").select(range(3)).to_list()
    )
    from datasets import Dataset

    requests = Dataset.from_list([{"messages": row["messages"]} for row in mixed])
    found = gk.own_refusals(model, tokenizer, requests, progress=False)
    assert [row[0]["content"] for row in found["messages"]] == [row[0]["content"] for row in requests["messages"][:2]]
    assert {row[1]["content"] for row in found["messages"]} == {"I'm sorry, but I can't help with that."}
    with pytest.raises(DataError, match="expected a model that refuses at least one of 3 requests"):
        gk.own_refusals(model, tokenizer, requests.select(range(2, 5)), progress=False)


# ----------------------------------------------------------------------------------------------- the KL divergence


def test_kl_is_zero_before_training_and_torchs_afterwards():
    model = tiny_llama()
    rows = encode(TOKENIZER, SAFETY)
    reference_model = ReferenceModel.of(model, rows, 0, batch_size=2)
    batch = collate([rows[2], rows[0]], 0)
    assert reference_model.losses(model, batch, [2, 0]).abs().max() < 1e-6
    moved = tiny_llama(seed=1)
    found = example_losses(reference_model.losses(moved, batch, [2, 0]), batch)
    for place, index in enumerate((2, 0)):
        ids = torch.tensor([rows[index].input_ids])
        counts = torch.tensor(rows[index].loss_mask[1:])
        now, before = (torch.log_softmax(one(input_ids=ids).logits[0, :-1], -1)[counts] for one in (moved, model))
        expected = torch.nn.functional.kl_div(now, before, log_target=True, reduction="none").sum(-1).mean()
        assert float(found[place].detach()) == pytest.approx(float(expected.detach()), rel=3e-4)  # p is stored in fp16


def divergence(before, now, rows):
    """KL(before ‖ now), the mean over the tokens of each row and then over the rows; torch."""
    losses = []
    for row in rows:
        ids, counts = torch.tensor([row.input_ids]), torch.tensor(row.loss_mask[1:])
        new, old = (torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)[counts] for model in (now, before))
        losses.append(torch.nn.functional.kl_div(new, old.detach(), log_target=True, reduction="none").sum(-1).mean())
    return torch.stack(losses).mean()


def test_safegrad_adds_the_gradient_of_the_divergence_after_the_projection():
    """From the second step on, when there is a divergence: g_u projected, then g_a added, by hand."""
    model = tiny_llama()
    start = copy.deepcopy(model)
    rows = encode(TOKENIZER, SAFETY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with SPF(SAFETY, rule="safegrad", tokenizer=TOKENIZER).attach(model, optimizer):
        for _ in range(2):
            twin = copy.deepcopy(model)
            optimizer.zero_grad()
            task_loss(model).backward()
            optimizer.step()
    parameters = list(twin.parameters())
    utility = torch.autograd.grad(task_loss(twin), parameters)
    safety = torch.autograd.grad(divergence(start, twin, rows), parameters)
    dot = sum((u * s).sum() for u, s in zip(utility, safety, strict=True))
    squared = sum((s * s).sum() for s in safety)
    share = min(float(dot / squared), 0.0)
    for one, new, u, s in zip(parameters, model.parameters(), utility, safety, strict=True):
        torch.testing.assert_close(new, one - 0.3 * (u - share * s + s), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["kl-left", "adaptive-kl-left"])
def test_rules_with_the_divergence_keep_their_promise_on_forbidden_and_benign_anchors(rule):
    """⟨Δθ, ∇KL⟩ of every step by autograd, over both sets."""
    model = tiny_llama()
    start, rows = copy.deepcopy(model), [*encode(TOKENIZER, SAFETY), *encode(TOKENIZER, CONTROL)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    spf = SPF(SAFETY, rule=rule, benign=CONTROL, anchors_per_step=len(rows), tokenizer=TOKENIZER)
    with spf.attach(model, optimizer) as guard:
        for _ in range(4):
            before = copy.deepcopy(model)
            optimizer.zero_grad()
            task_loss(model).backward()
            optimizer.step()
            parameters = list(before.parameters())
            gradients = torch.autograd.grad(divergence(start, before, rows), parameters)
            moves = [(new - old).detach() for new, old in zip(model.parameters(), parameters, strict=True)]
            changes = [float((move * gradient).sum()) for move, gradient in zip(moves, gradients, strict=True)]
            record = guard.records[-1]
            assert record.anchor_loss == pytest.approx(
                float(divergence(start, before, rows).detach()), rel=1e-3, abs=1e-6
            )
            # The probabilities before training are stored in fp16.
            assert record.first_order == pytest.approx(sum(changes), rel=1e-3, abs=3e-5)
            assert max(changes) <= 3e-5
    assert guard.certificate.violations == 0
    assert record.anchor_loss > 0.01


@pytest.mark.parametrize("every", [1, 3])
def test_where_the_model_has_not_moved_there_is_nothing_to_protect(every):
    """The first step is that of the task alone, and the second is measured anew."""
    spf = SPF(SAFETY, benign=CONTROL, refresh_every=every, tokenizer=TOKENIZER)
    guarded, free = tiny_llama(), tiny_llama()
    certificate = run(guarded, spf, sgd(0.1), steps=1)
    optimizer = torch.optim.SGD(free.parameters(), lr=0.1)
    task_loss(free).backward()
    optimizer.step()
    for one, other in zip(guarded.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert certificate.records[0].anchor_loss < 1e-6
    certificate = run(tiny_llama(), spf, sgd(0.1), steps=4)
    assert certificate.violations == 0
    fresh = [True] * 4 if every == 1 else [True, True, False, True]
    assert [record.fresh for record in certificate.records] == fresh


# -------------------------------------------------------------------------------------------------- the fence


def test_the_fence_asks_for_nothing_inside_and_brings_benign_loss_back_outside():
    """A task that unlearns the benign answers: with the fence their loss rises less, and safety is kept."""
    plain = {"rule": "mixed-left", "drift_correction": False}
    inside = run(tiny_llama(), SPF(SAFETY, tokenizer=TOKENIZER, **plain), sgd(0.2), steps=4)
    wide = SPF(SAFETY, tokenizer=TOKENIZER, **plain, benign=CONTROL, benign_margin=1e6)
    fenced = run(tiny_llama(), wide, sgd(0.2), steps=4)
    assert [one.first_order for one in fenced.records] == pytest.approx([one.first_order for one in inside.records])
    assert not any(one.corrected for one in fenced.records)
    learnt = tiny_llama()
    answers = conversations(("paint the bike", "fence bike do i"), ("how do we paint", "steal the fence"))
    finetune(learnt, TOKENIZER, answers, learning_rate=1e-2, steps=40, inplace=True, progress=False)
    losses = {"before": mean_loss(learnt, TOKENIZER, answers)}
    for name, benign in (("free", None), ("fenced", answers)):
        model = copy.deepcopy(learnt)
        certificate = run(model, SPF(SAFETY, rule="mixed-left", tokenizer=TOKENIZER, benign=benign), sgd(0.1), steps=12)
        assert certificate.violations == 0
        losses[name] = mean_loss(model, TOKENIZER, answers)
    assert any(record.corrected > 0 for record in certificate.records)
    assert losses["free"] > losses["before"] + 0.2
    assert losses["fenced"] < losses["before"] + 0.5 * (losses["free"] - losses["before"])


@pytest.mark.parametrize("loss", ["refusal", "kl"])
@pytest.mark.parametrize("largest", [4.0, 1e6])
def test_the_weight_of_the_safety_gradient_grows_with_the_drift(loss, largest):
    """From moved weights SGD takes the step −lr (g_u + w g_s), w = 2 · drift / 0.003 or the largest; autograd."""
    model = tiny_llama()
    before, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    spf = SPF(SAFETY, rule="mixing", loss=loss, mix=2, largest_mix=largest, tokenizer=TOKENIZER)
    with spf.attach(model, optimizer) as guard:
        for name, gradient in safety_gradients(model).items():
            model.get_parameter(name).data.add_(0.1 * gradient)
        guard.accept_weights()
        moved = copy.deepcopy(model)
        task_loss(model).backward()
        optimizer.step()
    if loss == "kl":
        safety = divergence(before, moved, encode(TOKENIZER, SAFETY))
    else:
        safety = anchors_loss(moved) - anchors_loss(before).detach()
    drift = float(safety.detach())
    assert drift > 0.006
    (task_loss(moved) + min(2 * drift / 0.003, largest) * safety).backward()
    for found, parameter in zip(model.parameters(), moved.parameters(), strict=True):
        error = found - (parameter - 0.1 * parameter.grad)
        assert error.norm() <= 2e-3 * (0.1 * parameter.grad).norm()  # KL's reference is stored in fp16
