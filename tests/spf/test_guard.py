import copy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from geomkit.collection.collect import collect_gradients
from geomkit.errors import SPFError
from geomkit.spf.rule import Rule
from geomkit.spf.rules import RULES, get_rule
from geomkit.spf.settings import SPF
from geomkit.spf.weights.blocks import ProductBlock, TensorBlock
from geomkit.spf.weights.guarded import Guarded
from geomkit.training.finetune import finetune
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# Those whose safety loss is that of tests.helpers.spf_training; for the divergence see test_anchors.
BLOCK_RULES = [name for name, rule in RULES.items() if rule.promise == "every block" and rule.loss == "refusal"]


def utility_loss(model):
    batch = TOKENIZER.apply_chat_template(
        [UTILITY[0]["messages"]], tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def train(model, spf, make_optimizer, steps=3, accumulate=1, clip=None):
    optimizer = make_optimizer(model.parameters())
    with spf.attach(model, optimizer) as guard:
        for _ in range(steps):
            for _ in range(accumulate):
                (utility_loss(model) / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return guard.certificate


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
}


@pytest.mark.parametrize("rule", [*BLOCK_RULES, "left without correction"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_applied_update_keeps_its_promise_under_every_optimizer(rule, optimizer):
    """⟨Δθ, g_s⟩ ≤ 0 for every parameter, measured here from copies of the weights and autograd's own gradient."""
    chosen = RULES.get(rule) or Rule("left", "update", "block", "left", rank=2)
    model = tiny_llama()
    make = OPTIMIZERS[optimizer]
    for _ in range(3):
        before = copy.deepcopy(model)
        loss = collect_gradients(before, TOKENIZER, SAFETY, progress=False)
        certificate = train(model, SPF(SAFETY, rule=chosen, tokenizer=TOKENIZER), make, steps=1)
        assert certificate.violations == 0
        old, new = dict(before.named_parameters()), dict(model.named_parameters())
        changes = {
            name: float(((new[name].detach().double() - old[name].detach().double()) * loss[name].dense()).sum())
            for name in loss
        }
        for name, change in changes.items():
            bound = torch.finfo(torch.float32).eps * float(old[name].detach().norm()) * loss[name].norm
            assert change <= 2 * bound, name
        record = certificate.records[0]
        assert record.first_order == pytest.approx(sum(changes.values()), abs=1e-6)
        # With safety's gradient added there is nothing left to remove here.
        assert record.fired > 0 or chosen.safety_gradient_weight
        assert record.leak < 1e-3


def test_leak_of_the_update_level_against_the_gradient_level():
    """The published form hands a projected gradient to AdamW, which puts the conflict back."""
    makers = {"rank1": RULES["rank1"], "demo": RULES["demo"]}
    found = {
        name: train(tiny_llama(), SPF(SAFETY, rule=rule, tokenizer=TOKENIZER), OPTIMIZERS["adamw"], steps=5)
        for name, rule in makers.items()
    }
    worst = {name: max(record.worst for record in certificate.records) for name, certificate in found.items()}
    assert found["rank1"].violations == 0
    assert worst["demo"] > 1e3 * worst["rank1"]


def test_gradient_level_holds_under_plain_sgd():
    found = train(tiny_llama(), SPF(SAFETY, rule="demo", tokenizer=TOKENIZER), lambda p: torch.optim.SGD(p, lr=0.1))
    assert found.violations == 0


def test_clipping_and_accumulation():
    spf = SPF(SAFETY, tokenizer=TOKENIZER)
    found = train(tiny_llama(), spf, OPTIMIZERS["adamw"], steps=2, accumulate=3, clip=0.1)
    assert (found.steps, found.violations) == (2, 0)


def test_drift_correction_brings_the_safety_loss_back():
    drift = Rule("rank1", "update", "block", "rank1", drift_correction=True)
    plain = Rule("rank1", "update", "block", "rank1")
    found = {
        rule.drift_correction: train(
            tiny_llama(), SPF(SAFETY, rule=rule, tokenizer=TOKENIZER), lambda p: torch.optim.SGD(p, lr=0.5), steps=10
        )
        for rule in (plain, drift)
    }
    assert any(record.bound < 0 for record in found[True].records)
    assert all(record.first_order <= record.bound + record.tolerance for record in found[True].records)
    assert found[True].records[-1].anchor_loss < found[False].records[-1].anchor_loss


def test_the_paper_tests_conflict_once_for_all_parameters_and_the_demo_for_each():
    fired = {}
    for rule in ("paper", "demo"):
        certificate = train(tiny_llama(), SPF(SAFETY, rule=rule, tokenizer=TOKENIZER), OPTIMIZERS["sgd"], steps=3)
        fired[rule] = [record.fired for record in certificate.records]
    assert all(share in {0.0, 1.0} for share in fired["paper"])
    assert any(0 < share < 1 for share in fired["demo"])


def test_mixing_adds_the_safety_gradient():
    model = tiny_llama()
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    safety = collect_gradients(expected, TOKENIZER, SAFETY, progress=False)
    utility_loss(expected).backward()
    for name, parameter in expected.named_parameters():
        parameter.grad += safety[name].dense()
    optimizer.step()
    train(model, SPF(SAFETY, rule="mixing", tokenizer=TOKENIZER), OPTIMIZERS["sgd"], steps=1)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_mixed_rule_projects_what_sgd_makes_of_both_gradients():
    model = tiny_llama()
    expected = copy.deepcopy(model)
    safety = collect_gradients(expected, TOKENIZER, SAFETY, progress=False)
    utility_loss(expected).backward()
    fired = 0
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            g = safety[name].dense()
            step = -0.1 * (parameter.grad + 0.2 * g)
            if (conflict := (step * g).sum()) > 0:
                step -= conflict / (g * g).sum() * g
                fired += 1
            parameter.add_(step)
    spf = SPF(SAFETY, rule="rank1", mix=0.2, tokenizer=TOKENIZER)  # little enough that some blocks still conflict
    certificate = train(model, spf, lambda p: torch.optim.SGD(p, lr=0.1), steps=1)
    assert 0 < fired < len(safety)
    assert certificate.violations == 0
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rule", ["mixing", "rank1"])
def test_mixing_in_the_trainer_clips_both_gradients_together(rule):
    """The norm that the Trainer clips to holds for the sum: nothing is added behind the clipping's back."""
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [p.grad.flatten() for p in kwargs["model"].parameters() if p.grad is not None]
            seen.append(float(torch.cat(gradients).norm()))

        def on_train_begin(self, args, state, control, **kwargs):
            kwargs["optimizer"].optimizer.register_step_post_hook(
                lambda optimizer, *_: seen.append(
                    float(torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]).norm())
                )
            )

    spf = SPF(SAFETY, rule=rule, mix=50)
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, spf, steps=1, progress=False, callbacks=[Watch()])
    assert result.history["grad_norm"][0] > 10  # before clipping, the safety gradient included
    assert seen == [pytest.approx(1.0, rel=1e-3)] * 2


# --------------------------------------------------------------------------------------------------- manners


def test_an_optimizer_has_one_guard():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer)
    with pytest.raises(SPFError, match="without a guard"):
        SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer)
    guard.detach()
    SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer).detach()


@pytest.mark.parametrize("rule", ["demo", "mixing", "mixed-left"])
def test_a_closure_hides_the_gradients_from_a_rule_that_changes_them(rule):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        loss = utility_loss(model)
        loss.backward()
        return loss.detach()

    with (
        SPF(SAFETY, rule=rule, tokenizer=TOKENIZER).attach(model, optimizer),
        pytest.raises(SPFError, match="closure"),
    ):
        optimizer.step(closure)
    optimizer.zero_grad()
    with SPF(SAFETY, rule="rank1", tokenizer=TOKENIZER).attach(model, optimizer) as guard:
        optimizer.step(closure)
    assert guard.certificate.records[0].fired > 0


@pytest.mark.parametrize("every", [1, 3])
def test_what_the_forward_pass_tells_is_what_a_reading_finds(monkeypatch, every):
    """⟨W, g_s⟩ before a step comes from the anchors' own pass, where it was at these weights; nothing else changes."""
    known = []

    def spied(guarded, products):
        known.append(set(products))
        return as_used(guarded, products)

    as_used = Guarded.as_used
    monkeypatch.setattr(Guarded, "as_used", spied)
    told, read = tiny_llama(), tiny_llama()
    spf = SPF(SAFETY, rule="rank1", tokenizer=TOKENIZER, refresh_every=every)
    found = train(told, spf, OPTIMIZERS["adamw"], steps=6)
    linear = {f"{path}.weight" for path, module in told.named_modules() if isinstance(module, nn.Linear)}
    assert known == [linear] * (6 // every)
    monkeypatch.setattr(Guarded, "as_used", lambda *_: {})
    expected = train(read, spf, OPTIMIZERS["adamw"], steps=6)
    for name, parameter in told.named_parameters():
        torch.testing.assert_close(parameter, read.get_parameter(name), rtol=1e-5, atol=1e-6)
    for one, other in zip(found.records, expected.records, strict=True):
        assert one.first_order_raw == pytest.approx(other.first_order_raw, rel=1e-3, abs=1e-6)
        assert one.fired == other.fired > 0


def test_what_the_forward_pass_tells_is_not_said_of_weights_that_it_did_not_use():
    weight, (first, second) = torch.ones(4, 3), (torch.ones(2, 3), torch.ones(4, 2))
    assert TensorBlock(weight).is_used
    assert TensorBlock(weight.bfloat16()).is_used
    assert not TensorBlock(weight.bfloat16(), master=True).is_used
    assert not TensorBlock(weight, rows=slice(0, 2)).is_used
    assert not TensorBlock(weight, scale=-1.0).is_used
    assert not ProductBlock([(second, first, 1.0)]).is_used


def test_where_the_safety_gradient_is_zero_the_step_passes():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)  # its gradient passes through zeros
    optimizer = torch.optim.SGD([model.model.layers[0].mlp.up_proj.weight], lr=0.1, weight_decay=0.1)
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    with SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer) as guard:
        optimizer.step()
    record = guard.certificate.records[0]
    assert (record.fired, record.first_order, record.violated) == (0.0, 0.0, False)


def test_steps_below_rounding_are_said_to_be_undecided():
    model = tiny_llama().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    utility_loss(model).backward()
    with SPF(SAFETY, rule="monitor", tokenizer=TOKENIZER).attach(model, optimizer) as guard:
        optimizer.step()
    assert guard.certificate.undecided == 1
    assert "1 steps cannot be told from rounding" in str(guard.certificate)


def test_the_guard_leaves_gradients_modes_and_random_state_alone_and_detaches():
    model = tiny_llama(attention_dropout=0.5).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = SPF(SAFETY, rule="rank1", tokenizer=TOKENIZER).attach(model, optimizer)
    utility_loss(model).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    guard.detach()
    optimizer.step()
    assert guard.certificate.steps == 1


def test_a_later_hook_that_undoes_the_projection_is_caught_at_the_next_step():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    safety = collect_gradients(model, TOKENIZER, SAFETY, progress=False)

    def undo(*_):
        for name, parameter in model.named_parameters():
            safety[name].add_to(parameter.detach(), 0.5)

    guard = SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer)
    optimizer.register_step_post_hook(undo)
    utility_loss(model).backward()
    optimizer.step()
    with pytest.raises(SPFError, match=r"where step 1 left it, .* attach SPF after other hooks"):
        optimizer.step()
    with pytest.raises(SPFError, match=r"where step 1 left it, .* no guarded step was seen"):
        guard.detach()


def test_a_correction_that_does_not_arrive_is_caught(monkeypatch):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr("geomkit.spf.weights.blocks.TensorBlock.apply", lambda *_: None)
    utility_loss(model).backward()
    with (
        SPF(SAFETY, rule="mixed-left", tokenizer=TOKENIZER).attach(model, optimizer),
        pytest.raises(SPFError, match=r"step 1: expected .* no block's beyond its bound"),
    ):
        optimizer.step()


def test_what_was_measured_for_a_step_that_broke_off_is_not_used_for_the_next():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=float("inf"))
    with SPF(SAFETY, rule="mixed-left", tokenizer=TOKENIZER).attach(model, optimizer) as guard:
        utility_loss(model).backward()
        with pytest.raises(SPFError, match="expected a finite update"):
            optimizer.step()
        other = tiny_llama(seed=3)
        with torch.no_grad():
            for one, new in zip(model.parameters(), other.parameters(), strict=True):
                one.copy_(new)
        guard.accept_weights()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
    loss = collect_gradients(other, TOKENIZER, SAFETY, progress=False).loss
    assert guard.certificate.records[0].anchor_loss == pytest.approx(loss, rel=1e-5)


def test_wrong_input_says_what_to_do():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SPFError, match="expected a tokenizer"):
        SPF(SAFETY).attach(model, optimizer)
    with pytest.raises(SPFError, match="expected one of the rules rank1"):
        SPF(SAFETY, rule="none", tokenizer=TOKENIZER).attach(model, optimizer)
    with pytest.raises(SPFError, match="a rank for a rule"):
        get_rule("rank1", rank=3)
    for wrong in (
        {"rule": 3}, {"rule": "left", "rank": "3"}, {"mix": "1"}, {"drift_margin": -1}, {"loss": "mse"}, {"seed": None},
        {"refresh_every": None}, {"drift_correction": "no"}, {"anchors": None},
    ):  # fmt: skip
        with pytest.raises(SPFError, match="expected"):
            SPF(**{"anchors": SAFETY} | wrong, tokenizer=TOKENIZER).checked_rule()
    with pytest.raises(SPFError, match="build the optimizer from this very model"):
        SPF(SAFETY, tokenizer=TOKENIZER).attach(tiny_llama(), optimizer)
    meta = copy.deepcopy(model).to("meta")
    on_meta = torch.optim.SGD(meta.parameters(), lr=0.1)
    with pytest.raises(SPFError, match="meta device"):
        SPF(SAFETY, tokenizer=TOKENIZER).attach(meta, on_meta)
    with pytest.raises(SPFError, match="anchors_per_step to be a whole number from 1"):
        SPF(SAFETY, anchors_per_step=0, tokenizer=TOKENIZER).attach(model, optimizer)
