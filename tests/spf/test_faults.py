"""What goes wrong has a defined end: an error that names it while nothing is lost, or a step that passes."""

import copy
import math

import pytest
import torch
from torch import nn

from geomkit.errors import CollectionError, DataError, SPFError
from geomkit.inputs.examples import load_examples
from geomkit.spf.settings import SPF
from tests.helpers.spf_training import TOKENIZER, change_of_loss, run, safety_gradients, task_loss, weights_of
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, conversations, tiny_llama


def spf(**settings):
    return SPF(SAFETY, tokenizer=TOKENIZER, **{"rule": "mixed-left"} | settings)


def sgd(rate=0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def unchanged(model, before):
    return all(torch.equal(one.detach().double(), before[name]) for name, one in model.named_parameters())


def test_a_broken_anchor_pass_ends_the_run_before_the_step():
    """The loss on the task is finite, that on the anchors is not: their tokens' embedding is broken."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with spf().attach(model, optimizer) as guard:
        with torch.no_grad():
            model.model.embed_tokens.weight[TOKENIZER.convert_tokens_to_ids("sorry")] = torch.inf
        guard.accept_weights()  # by hand, as no guarded step would leave them
        before = weights_of(model)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        with pytest.raises(CollectionError, match="expected a finite loss"):
            optimizer.step()
    assert unchanged(model, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_task_gradient_ends_the_run_before_the_step(value):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = weights_of(model)
    with spf().attach(model, optimizer):
        task_loss(model).backward()
        model.model.norm.weight.grad[2] = value
        with pytest.raises(SPFError, match=r"model\.norm\.weight: expected a finite gradient .* as they were"):
            optimizer.step()
    assert unchanged(model, before)
    assert not optimizer.state


def test_a_broken_update_is_named():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=float("inf"))
    guard = spf().attach(model, optimizer)
    task_loss(model).backward()
    with pytest.raises(SPFError, match=r"expected a finite update, found NaN or inf; lower the learning rate"):
        optimizer.step()
    with pytest.raises(SPFError, match="moved while no guarded step was seen"):  # the spoilt weights are there
        guard.detach()


def test_an_anchor_without_an_assistant_token_is_refused_at_once():
    silent = conversations(("how do i steal the bike", "sorry"), ("steal the fence", "no"))
    silent = silent.map(lambda row: {"messages": row["messages"][:1]})
    model = tiny_llama()
    with pytest.raises(DataError, match="expected an assistant message to take the loss on"):
        SPF(silent, tokenizer=TOKENIZER).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_weights_that_are_unfrozen_in_mid_run_are_guarded_from_then_on():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with spf().attach(model, optimizer) as guard:
        for free in (False, True, False):
            model.lm_head.weight.requires_grad_(free)
            optimizer.zero_grad()
            task_loss(model).backward()
            gradients, before = safety_gradients(model), weights_of(model)
            optimizer.step()
            changes = change_of_loss(before, weights_of(model), gradients)
            assert ("lm_head.weight" in guard.certificate.records[-1].blocks) == free
            assert (changes["lm_head.weight"] != 0) == free
            assert max(changes.values()) < 1e-6
    assert guard.certificate.violations == 0


def test_freezing_all_that_the_optimizer_holds_ends_the_run():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    with spf().attach(model, optimizer):
        task_loss(model).backward()
        model.lm_head.requires_grad_(False)
        with pytest.raises(SPFError, match="expected an optimizer with trainable parameters, found none"):
            optimizer.step()


def test_a_parameter_of_two_modules_is_one_block():
    """The head is the embedding: its gradient has looked-up rows and token factors."""
    model = tiny_llama(tied=True)
    for rule in ("rank1", "left"):
        twin, seen = copy.deepcopy(model), {}

        def watch(when, model, seen=seen):
            if when == "before":
                seen.update(gradients=safety_gradients(model), weights=weights_of(model))
            else:
                seen["after"] = weights_of(model)

        record = run(twin, spf(rule=rule), sgd(0.3), watch=watch).records[0]
        assert "lm_head.weight" not in record.blocks
        changes = change_of_loss(seen["weights"], seen["after"], seen["gradients"])
        assert max(changes.values()) < 1e-6
        assert record.first_order == pytest.approx(sum(changes.values()), abs=1e-6)


def test_a_part_of_the_model_can_be_trained():
    """What the optimizer does not hold is neither measured nor moved, and stays trainable."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.model.layers[1].parameters(), lr=0.3)
    with spf().attach(model, optimizer) as guard:
        task_loss(model).backward()
        optimizer.step()
    assert all("layers.1." in name for name in guard.certificate.records[0].blocks)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert guard.certificate.violations == 0


def test_a_module_that_the_anchors_never_reach_is_free():
    """Its safety gradient is zero: nothing is promised of it and nothing is lost."""
    model = tiny_llama()
    model.spare = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with spf().attach(model, optimizer) as guard:
        model.spare.weight.grad = torch.ones(3, 3)
        task_loss(model).backward()
        optimizer.step()
    assert not any(name.startswith("spare") for name in guard.certificate.records[0].blocks)


@pytest.mark.parametrize("master", [False, True])
def test_bf16_weights(master):
    """With fp32 beside them each step keeps its promise to fp32; without, to what rounding adds, as is said."""
    model = tiny_llama().to(torch.bfloat16)
    certificate = run(model, spf(rule="rank1", master_weights=master, drift_correction=False), sgd(0.05), steps=4)
    assert certificate.violations == 0
    tolerance = max(record.tolerance for record in certificate.records)
    leak = max(record.leak for record in certificate.records)
    if master:
        assert tolerance < 1e-4
        assert leak < 1e-4
    else:
        assert tolerance > 1e-3
        assert leak > 1e-2
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_settings_that_mean_nothing_are_refused():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for settings, words in (
        ({"refresh_every": 0}, "refresh_every to be a whole number from 1"),
        ({"correction_limit": 0.0}, "correction_limit to be a number above 0"),
        ({"anchors_per_step": "many"}, "anchors_per_step to be a whole number"),
        ({"seed": 2**70}, "seed to be a whole number"),
        ({"refresh_energy": 0.9, "rule": "rank1"}, "a rule that removes a subspace"),
        ({"refresh_energy": 1.5, "rule": "left"}, "above 0 to 1"),
        ({"benign": CONTROL, "benign_per_step": 0}, "benign_per_step to be a whole number from 1"),
        ({"mix": -1}, "mix to be a finite number from 0, found -1"),
        ({"drift_margin": math.nan}, "drift_margin to be .*, found nan"),
    ):
        with pytest.raises(SPFError, match=words):
            spf(**settings).attach(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_anchors_come_from_a_file_or_a_shipped_set(tmp_path):
    path = tmp_path / "anchors.jsonl"
    SAFETY.to_json(path)
    of_file = run(tiny_llama(), SPF(path, rule="mixed-left", tokenizer=TOKENIZER), sgd(), steps=2)
    given = run(tiny_llama(), spf(), sgd(), steps=2)
    assert [one.first_order for one in of_file.records] == [one.first_order for one in given.records]
    with pytest.raises(DataError, match=r"expected a file at none\.jsonl"):
        run(tiny_llama(), SPF("none.jsonl", tokenizer=TOKENIZER), sgd())
    assert len(load_examples("safety")) == 64


@pytest.mark.parametrize("rule", ["rank1", "left", "two-sided", "cone", "null-space"])
def test_fp64_weights_keep_their_promise_to_what_fp32_bases_allow(rule):
    model = tiny_llama().double()
    certificate = run(model, spf(rule=rule), lambda p: torch.optim.AdamW(p, lr=0.01), steps=6)
    assert certificate.violations == 0
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())


@pytest.mark.parametrize("rule", ["left", "two-sided"])
@pytest.mark.parametrize("seed", range(4))
def test_a_fence_beside_subspaces_breaks_no_blocks_promise(rule, seed):
    """Benign gradients that oppose safety's inside the subspace: stepping back along them conflicts anew there."""
    protected = spf(rule=rule, rank=2, benign=UTILITY, benign_margin=-5.0)
    certificate = run(tiny_llama(seed=seed), protected, lambda p: torch.optim.AdamW(p, lr=0.01), steps=12)
    assert certificate.violations == 0
    assert any(record.corrected > 0 for record in certificate.records)


def test_nothing_moves_inside_a_closed_subspace_for_drift_neither():
    model = tiny_llama()
    start = weights_of(model)
    closed = spf(rule="null-space", rank=2, drift_correction=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with closed.attach(model, optimizer) as guard:
        bases = {}
        for _ in range(8):
            optimizer.zero_grad()
            task_loss(model).backward()
            optimizer.step()
            protections = guard._protected.protections
            bases |= {name: one.left.double() for name, one in protections.items() if one.left is not None}
    assert guard.certificate.violations == 0
    for name, left in bases.items():
        moved = weights_of(model)[name] - start[name]
        assert float((left.T @ moved).norm() / moved.norm()) < 1e-5


def test_one_block_alone_breaks_the_promise_of_a_closed_subspace(monkeypatch):
    from geomkit.spf.weights.blocks import TensorBlock

    model, apply = tiny_llama().to(torch.bfloat16), TensorBlock.apply
    ignored = model.model.layers[0].self_attn.q_proj.weight.data_ptr()

    def all_but_one(block, moves):
        if block._tensor.data_ptr() != ignored:
            apply(block, moves)

    monkeypatch.setattr(TensorBlock, "apply", all_but_one)
    with pytest.raises(SPFError, match="expected no movement inside the protected subspace"):
        run(model, spf(rule="null-space", rank=4), sgd(1.0), steps=3)


def test_sparse_gradients_are_refused_where_they_would_be_projected():
    model = tiny_llama()
    model.model.embed_tokens.sparse = True
    for rule in ("demo", "mixing"):
        with pytest.raises(SPFError, match="expected dense gradients"):
            run(model, spf(rule=rule), sgd())


def test_large_fp16_gradients_are_no_overflow():
    from geomkit.spf.weights.trained import refuse_broken_gradients

    weight = nn.Parameter(torch.zeros(300, 300, dtype=torch.float16))
    weight.grad = torch.ones_like(weight)
    refuse_broken_gradients({"w": weight})
    weight.grad[3, 4] = torch.inf
    with pytest.raises(SPFError, match="w: expected a finite gradient"):
        refuse_broken_gradients({"w": weight})
