"""Whatever moves a protected weight between attaching and detaching is measured, or the certificate says it was not.

The reference is autograd's safety gradient on copies of the weights before and after each step.
"""

import logging

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import geomkit as gk
from geomkit.errors import GeomkitError, SPFError
from geomkit.spf.settings import SPF
from tests.helpers.spf_training import TOKENIZER, change_of_loss, safety_gradients, task_loss, weights_of
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama

UNSEEN = "moved while no guarded step was seen"


def attached(model, optimizer, rule="rank1", **settings):
    return SPF(SAFETY, rule=rule, tokenizer=TOKENIZER, **settings).attach(model, optimizer)


def measured(model, act, names=None):
    """Return ⟨Δθ, g_s⟩ of what a function does to the weights, summed over parameters, by autograd."""
    before, gradients = weights_of(model), safety_gradients(model)
    act()
    changes = change_of_loss(before, weights_of(model), gradients)
    return sum(change for name, change in changes.items() if names is None or name in names)


def agrees(guard, change):
    return guard.certificate.records[-1].first_order == pytest.approx(change, rel=1e-4, abs=1e-8)


# ---------------------------------------------------------------------------- 1. what the optimizer moves is guarded


@pytest.mark.parametrize("when", ["in mid-run", "before attaching"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_that_are_frozen_but_have_a_gradient_are_guarded(when, optimizer_class):
    model = tiny_llama()
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    if when == "before attaching":
        task_loss(model).backward()
        model.lm_head.weight.requires_grad_(False)
    guard = attached(model, optimizer)
    for _ in range(2):
        if when == "in mid-run":
            model.lm_head.weight.requires_grad_(True)
            optimizer.zero_grad()
            task_loss(model).backward()
            model.lm_head.weight.requires_grad_(False)
        head = model.lm_head.weight.clone()
        change = measured(model, optimizer.step)
        assert not torch.equal(head, model.lm_head.weight)  # torch's optimizers go by the gradient
        assert "lm_head.weight" in guard.certificate.records[-1].blocks
        assert agrees(guard, change)
        assert not model.lm_head.weight.requires_grad  # left as it was
    guard.detach()


class MovesAll(torch.optim.SGD):
    """Decays every parameter that it holds, with or without a gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.mul_(0.99)


def test_frozen_weights_that_the_optimizer_moves_all_the_same_are_refused():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    optimizer = MovesAll(model.parameters(), lr=0.01)
    guard = attached(model, optimizer)
    task_loss(model).backward()
    with pytest.raises(SPFError, match=r"expected 'lm_head\.weight' where it was, as it is frozen"):
        optimizer.step()
    guard.release()


class FreezesLate(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        kwargs["model"].lm_head.weight.requires_grad_(False)


def test_weights_that_a_callback_freezes_before_the_step_are_guarded():
    result = gk.finetune(
        tiny_llama(), TOKENIZER, UTILITY, spf=SPF(SAFETY, rule="rank1"), steps=2, learning_rate=1e-2,
        callbacks=[FreezesLate()], progress=False,
    )  # fmt: skip
    first, second = result.certificate.records
    assert "lm_head.weight" in first.blocks  # frozen, but with the gradient of the step
    assert "lm_head.weight" not in second.blocks  # frozen, and without gradient: AdamW leaves it alone


# ----------------------------------------------------------------------------------------- 1b. several optimizers


def two_optimizers(model):
    """Muon's way: one optimizer for the matrices, another for the rest."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    return torch.optim.SGD(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01)


@pytest.mark.parametrize("rule", ["rank1", "mixed-left", "monitor"])
def test_each_step_of_several_optimizers_is_guarded(rule):
    model = tiny_llama()
    optimizers = two_optimizers(model)
    guard = attached(model, list(optimizers), rule)
    for _ in range(3):
        model.zero_grad()
        task_loss(model).backward()
        for optimizer in optimizers:
            change = measured(model, optimizer.step)
            assert agrees(guard.guards[optimizers.index(optimizer)], change)
    certificate = guard.certificate
    assert [record.step for record in certificate.records] == [1, 2, 3, 4, 5, 6]
    blocks = [set(record.blocks) for record in certificate.records[:2]]
    assert blocks[0] | blocks[1] == dict(model.named_parameters()).keys()
    assert not blocks[0] & blocks[1]
    assert certificate.share == pytest.approx(1)
    guard.detach()


@pytest.mark.parametrize("rule", ["mixing", "mixed-left"])
@pytest.mark.parametrize("turns", ["01", "0011", "1001", "011", "0001"])
def test_the_safety_gradient_reaches_each_optimizer_at_each_of_its_steps(rule, turns):
    """Whatever the order of the steps: what arrives in ``.grad`` beyond the task's gradient is g_s at the time."""
    model = tiny_llama()
    optimizers = two_optimizers(model)
    with attached(model, list(optimizers), rule):
        for turn in turns:
            optimizer = optimizers[int(turn)]
            model.zero_grad()
            task_loss(model).backward()
            before = {name: weight.grad.clone() for name, weight in model.named_parameters()}
            expected = safety_gradients(model)
            optimizer.step()
            held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
            for name, weight in model.named_parameters():
                added = weight.grad - before[name]
                wanted = expected[name] if id(weight) in held else torch.zeros_like(added)
                torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-6)


def test_several_optimizers_under_a_gradient_scaler():
    """Each optimizer's gradients are unscaled when its own step begins; an overflow in one of them skips only that."""
    model = tiny_llama()
    optimizers = two_optimizers(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with attached(model, list(optimizers), "mixed-left") as guard:
        for overflows in (False, True):
            model.zero_grad()
            scaler.scale(task_loss(model)).backward()
            if overflows:
                optimizers[1].param_groups[0]["params"][0].grad.fill_(torch.inf)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    assert [one.steps for one in guard.guards] == [2, 1]


def test_a_guard_that_was_released_in_mid_step_changes_nothing_any_more():
    model = tiny_llama()
    first, second = two_optimizers(model)
    start = weights_of(model)

    def broken_off():
        with attached(model, [first, second]) as guard:
            guards.append(guard)
            task_loss(model).backward()
            first.step()
            raise KeyboardInterrupt

    guards = []
    with pytest.raises(KeyboardInterrupt):
        broken_off()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(start[name])
    assert guards[0].steps == 1
    assert all(torch.equal(start[name], weight) for name, weight in weights_of(model).items())


def test_several_optimizers_have_no_log_and_an_empty_list_is_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(SPFError, match=r"with one optimizer only, found a list of 2, .* give the optimizer itself"):
        attached(model, list(two_optimizers(model)), log=tmp_path / "spf.jsonl")
    with pytest.raises(SPFError, match="expected an optimizer, found an empty list"):
        attached(model, [])


def test_an_optimizer_without_guard_beside_a_guarded_one_is_told(caplog):
    model = tiny_llama()
    matrices, others = two_optimizers(model)
    with caplog.at_level(logging.WARNING):
        guard = attached(model, matrices)
    total = sum(weight.numel() for weight in model.parameters())
    held = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    assert f"SPF guards {100 * held / total:.0f} % of the trainable parameters" in caplog.text
    task_loss(model).backward()
    matrices.step()
    others.step()
    assert guard.certificate.share == pytest.approx(held / total)
    assert "only 98.4 % of the trainable parameters are under guard" in str(guard.certificate)  # rounded down
    guard.detach()


def test_a_whole_model_under_guard_is_not_warned_about(caplog):
    model = tiny_llama()
    with caplog.at_level(logging.WARNING):
        attached(model, torch.optim.SGD(model.parameters(), lr=0.1)).detach()
    assert "SPF guards" not in caplog.text


# ------------------------------------------------------------------------------------------------------ 2. storage


class AssignsData(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data = weight.data - group["lr"] * weight.grad


class PublishedSAM(torch.optim.Optimizer):
    """SAM as published (davda54): the old weights come back by ``p.data = …`` within ``step(closure)``."""

    def __init__(self, params, lr, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["old"] = weight.data.clone()
                weight.add_(weight.grad, alpha=group["rho"])
        self.zero_grad()
        closure()
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data = self.state[weight]["old"]
        self.base.step()


@pytest.mark.parametrize("rule", ["rank1", "mixed-left"])
def test_an_optimizer_that_assigns_new_storage_is_measured_on_it(rule):
    model = tiny_llama()
    optimizer = AssignsData(model.parameters(), lr=0.1)
    guard = attached(model, optimizer, rule)
    for _ in range(3):
        model.zero_grad()
        task_loss(model).backward()
        assert agrees(guard, measured(model, optimizer.step))
    assert guard.certificate.violations == 0
    guard.detach()


def test_new_storage_keeps_the_master_weights():
    model = tiny_llama().bfloat16()
    optimizer = AssignsData(model.parameters(), lr=0.1)
    guard = attached(model, optimizer, master_weights=True)
    for _ in range(3):
        model.zero_grad()
        task_loss(model).backward()
        optimizer.step()
    masters = guard.guarded.fp32_masters()
    assert all(torch.equal(model.get_parameter(name), master.bfloat16()) for name, master in masters.items())
    corrected = [name for name, master in masters.items() if not torch.equal(master, master.bfloat16().float())]
    assert corrected
    guard.detach()


def test_sam_as_published_is_measured():
    model = tiny_llama()
    optimizer = PublishedSAM(model.parameters(), lr=0.05)
    guard = attached(model, optimizer)

    def closure():
        loss = task_loss(model)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.zero_grad()
        task_loss(model).backward()
        assert agrees(guard, measured(model, lambda: optimizer.step(closure)))
    guard.detach()


class ChangesType(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data = weight.data.double()


def test_a_step_that_changes_the_type_of_weights_is_refused():
    model = tiny_llama()
    optimizer = ChangesType(model.parameters(), lr=0.1)
    guard = attached(model, optimizer)
    task_loss(model).backward()
    with pytest.raises(SPFError, match="keep the shape, type and device"):
        optimizer.step()
    guard.release()


# -------------------------------------------------------------------------------------------- 3. after the last step


class Lookahead(torch.optim.SGD):
    """Moves the weights after ``super().step()``, outside the hooks of the inner step only."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.mul_(1.01)


def test_what_a_subclass_moves_after_its_parents_step_is_measured():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)  # from now on torch hooks both levels
    model = tiny_llama()
    optimizer = Lookahead(model.parameters(), lr=0.05)
    guard = attached(model, optimizer)
    for _ in range(2):
        model.zero_grad()
        task_loss(model).backward()
        assert agrees(guard, measured(model, optimizer.step))
    assert guard.steps == 2
    guard.detach()


def noise(model, scale=1e-2):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


def test_an_error_that_a_loop_swallows_leaves_no_clean_certificate():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    optimizer = MovesAll(model.parameters(), lr=0.01)
    guard = attached(model, optimizer)
    for _ in range(2):
        task_loss(model).backward()
        with pytest.raises(SPFError):
            optimizer.step()
    with pytest.raises(SPFError, match=UNSEEN):
        _ = guard.certificate
    with pytest.raises(SPFError, match=UNSEEN):
        guard.detach()


@pytest.mark.parametrize("rule", ["left", "rank1", "mixed-left"])
def test_a_step_inside_autocast_is_corrected_in_full_precision(rule):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attached(model, optimizer, rule) as guard:
        for _ in range(2):
            model.zero_grad()
            task_loss(model).backward()
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.step()
    assert guard.certificate.violations == 0
    assert max(record.leak for record in guard.certificate.records) < 1e-4


@pytest.mark.parametrize("rule", ["rank1", "mixed-left"])
@pytest.mark.parametrize("mixes", [False, True])
def test_weights_that_are_frozen_in_mid_run_are_not_trained_by_spf(rule, mixes):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attached(model, optimizer, rule) as guard:
        for step in range(3):
            optimizer.zero_grad(set_to_none=False)
            if step == 1:
                model.lm_head.weight.requires_grad_(False)
            head = model.lm_head.weight.clone()
            if mixes:
                guard.mix()
            task_loss(model).backward()
            optimizer.step()
            moved = float((model.lm_head.weight - head).detach().abs().max())
            assert moved < 1e-6 if step else moved > 1e-4  # readings of the same weights differ by rounding


def test_a_move_below_the_update_but_beyond_rounding_is_seen():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    guard = attached(model, optimizer)
    for _ in range(2):
        task_loss(model).backward()
        optimizer.step()
        model.zero_grad()
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + 0.9e-5)
    task_loss(model).backward()
    with pytest.raises(SPFError, match=UNSEEN):
        optimizer.step()
    guard.release()


def test_weights_that_another_optimizer_trains_from_mid_run_on_count_in_the_share():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    with attached(model, optimizer) as guard:
        task_loss(model).backward()
        optimizer.step()
        assert guard.certificate.share == 1
        model.lm_head.weight.requires_grad_(True)
        task_loss(model).backward()
        optimizer.step()
    total = sum(weight.numel() for weight in model.parameters())
    assert guard.certificate.share == pytest.approx(1 - model.lm_head.weight.numel() / total)


def test_a_later_hook_at_the_last_step_is_found_on_leaving():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = attached(model, optimizer)
    optimizer.register_step_post_hook(lambda *_: noise(model))
    task_loss(model).backward()
    with pytest.raises(SPFError, match=UNSEEN), guard:
        optimizer.step()


class Moves(TrainerCallback):
    """Moves weights at one event of the Trainer."""

    def __init__(self, event, step=2):
        self.step = step
        setattr(self, event, self._move)

    def _move(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            noise(kwargs["model"])


@pytest.mark.parametrize(
    ("event", "step"), [("on_step_end", 2), ("on_save", 2), ("on_train_end", 2), ("on_optimizer_step", 1)]
)
def test_a_callback_that_moves_weights_after_the_last_step_ends_the_run(event, step, tmp_path):
    with pytest.raises(GeomkitError, match=UNSEEN):
        gk.finetune(
            tiny_llama(), TOKENIZER, UTILITY, spf=SPF(SAFETY, rule="rank1"), steps=2, learning_rate=1e-2,
            callbacks=[Moves(event, step)], checkpoints=tmp_path, progress=False,
        )  # fmt: skip


def test_no_checkpoint_of_weights_that_nobody_measured_is_complete(tmp_path):
    with pytest.raises(GeomkitError, match=UNSEEN):
        gk.finetune(
            tiny_llama(), TOKENIZER, UTILITY, spf=SPF(SAFETY, rule="rank1"), steps=4, learning_rate=1e-2,
            callbacks=[Moves("on_step_end", step=2)], checkpoints=tmp_path, save_steps=2, progress=False,
        )  # fmt: skip
    result = gk.finetune(
        tiny_llama(), TOKENIZER, UTILITY, spf=SPF(SAFETY, rule="rank1"), steps=4, learning_rate=1e-2,
        checkpoints=tmp_path, save_steps=2, progress=False,
    )  # fmt: skip
    assert [record.step for record in result.certificate.records] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- 4. nested steps


class Sub(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("rule", ["mixing", "mixed-left", "safegrad"])
def test_the_safety_gradient_is_added_once_where_a_step_calls_its_parents(rule):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    ends = []
    for optimizer_class in (torch.optim.SGD, Sub):
        model = tiny_llama()
        optimizer = optimizer_class(model.parameters(), lr=0.05)
        guard = attached(model, optimizer, rule)
        for _ in range(2):
            model.zero_grad()
            task_loss(model).backward()
            optimizer.step()
        assert guard.steps == 2
        guard.detach()
        ends.append(weights_of(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("rule", ["mixing", "mixed-left", "safegrad", "paper"])
def test_a_closure_that_would_lose_the_changed_gradients_is_refused(rule):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = attached(model, optimizer, rule)
    task_loss(model).backward()  # gradients are there: without the check nothing would be missing
    before = weights_of(model)
    with pytest.raises(SPFError, match=r"step\(\) without a closure"):
        optimizer.step(lambda: task_loss(model))
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())
    guard.release()


class Retries(torch.optim.SGD):
    """Calls ``super().step()`` again after an error within it."""

    def step(self, closure=None):
        try:
            self.raising()
        except ZeroDivisionError:
            return super().step(closure)

    def raising(self):
        super().step(self._divide)

    @staticmethod
    def _divide():
        raise ZeroDivisionError


def test_a_step_that_tries_its_parents_again_is_one_step():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    model = tiny_llama()
    optimizer = Retries(model.parameters(), lr=0.05)
    guard = attached(model, optimizer)
    for _ in range(2):
        model.zero_grad()
        task_loss(model).backward()
        assert agrees(guard, measured(model, optimizer.step))
    assert guard.steps == 2
    guard.detach()


class Fails(torch.optim.SGD):
    fails = True

    def step(self, closure=None):
        result = super().step(closure)
        if self.fails:
            raise ZeroDivisionError
        return result


@pytest.mark.parametrize("moves", [True, False])
def test_after_a_step_that_failed_half_way(moves):
    """What it moved is refused; where it moved nothing, the next step is a guarded step like any other."""
    model = tiny_llama()
    optimizer = Fails(model.parameters(), lr=0.05 if moves else 0.0)
    guard = attached(model, optimizer)
    task_loss(model).backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.fails = False
    optimizer.param_groups[0]["lr"] = 0.05
    if moves:
        with pytest.raises(SPFError, match=UNSEEN):
            optimizer.step()
        guard.release()
        return
    assert agrees(guard, measured(model, optimizer.step))
    assert guard.steps == 1
    guard.detach()


# ---------------------------------------------------------------------------------------- 5 and 6. what it speaks of


def test_a_certificate_of_gradients_of_earlier_steps_says_so():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attached(model, optimizer, refresh_every=2) as guard:
        for _ in range(2):
            model.zero_grad()
            task_loss(model).backward()
            optimizer.step()
    assert "g_s is that of the anchors as last measured" in str(guard.certificate)


def test_a_certificate_without_a_correction_says_so():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attached(model, optimizer, "monitor") as guard:
        task_loss(model).backward()
        optimizer.step()
    assert guard.certificate.is_idle
    assert "no step was projected or corrected" in str(guard.certificate).splitlines()[0]
