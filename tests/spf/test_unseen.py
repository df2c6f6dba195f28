"""A guard that saw no step while weights moved raises: on leaving, on detaching, and when asked for the certificate."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from geomkit.errors import SPFError
from geomkit.inputs.batches import collate
from geomkit.inputs.tokens import encode
from geomkit.spf.callback import SPFCallback
from geomkit.spf.settings import SPF
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
UNSEEN = "moved while no guarded step was seen"


class SAM(torch.optim.Optimizer):
    """Foret et al. 2021 in two calls, as it is mostly implemented: its training loop never calls ``step()``."""

    def __init__(self, params, lr, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["old"] = weight.clone()
                weight.add_(weight.grad / (weight.grad.norm() + 1e-12), alpha=group["rho"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.copy_(self.state[weight]["old"] - group["lr"] * weight.grad)

    @torch.no_grad()
    def step(self):
        """Plain descent, which the guard sees."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(weight.grad, alpha=group["lr"])


def utility_loss(model):
    batch = collate(list(encode(TOKENIZER, UTILITY)), 0)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss


def by_sam(model, optimizer):
    for act in (optimizer.first_step, optimizer.second_step):
        model.zero_grad()
        utility_loss(model).backward()
        act()


def by_another_optimizer(model, _):
    utility_loss(model).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-4).step()


def by_hand(model, _):
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 0.01


def behind_autograds_back(model, _):
    model.lm_head.weight.data.mul_(1.001)


def in_new_storage(model, _):
    model.model.norm.weight.data = model.model.norm.weight.data + 0.01


@pytest.mark.parametrize("rule", ["rank1", "mixed-left", "paper", "monitor"])
@pytest.mark.parametrize("move", [by_sam, by_another_optimizer, by_hand, behind_autograds_back, in_new_storage])
@pytest.mark.parametrize("steps", [0, 2])
def test_moves_that_no_guarded_step_made_are_refused_in_every_way_out(move, rule, steps):
    model = tiny_llama()
    optimizer = SAM(model.parameters(), lr=0.01)
    guard = SPF(SAFETY, rule=rule, tokenizer=TOKENIZER).attach(model, optimizer)
    for _ in range(steps):
        model.zero_grad()
        utility_loss(model).backward()
        optimizer.step()
    assert guard.certificate.steps == steps  # nothing to complain about yet
    model.zero_grad()
    move(model, optimizer)
    with pytest.raises(SPFError, match=UNSEEN):
        _ = guard.certificate
    with pytest.raises(SPFError, match=rf"{UNSEEN} \({steps} were seen\).* call step\(\)"), guard:
        pass
    with pytest.raises(SPFError, match=UNSEEN):  # after detaching as well
        _ = guard.certificate
    assert len(guard.records) == steps


def test_the_first_step_does_not_cover_earlier_moves():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer)
    by_hand(model, optimizer)
    utility_loss(model).backward()
    with pytest.raises(SPFError, match=r"where attaching SPF left it, .*moved while no guarded step"):
        optimizer.step()
    guard.release()


def test_a_rule_without_a_promise_looks_before_every_step():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = SPF(SAFETY, rule="monitor", tokenizer=TOKENIZER).attach(model, optimizer)
    utility_loss(model).backward()
    optimizer.step()
    by_hand(model, optimizer)
    with pytest.raises(SPFError, match=r"where step 1 left it, .*moved while no guarded step"):
        optimizer.step()
    guard.release()


def test_what_moves_nothing_or_comes_after_detaching_is_no_matter():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer) as guard:
        utility_loss(model).backward()
        optimizer.step()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        by_hand(model, optimizer)
        model.load_state_dict(before)  # as averaged weights that are swapped in and out
    by_hand(model, optimizer)
    assert guard.certificate.steps == 1
    guard.detach()


def test_another_error_that_ends_the_block_is_not_hidden():
    model = tiny_llama()
    guard = SPF(SAFETY, tokenizer=TOKENIZER).attach(model, torch.optim.SGD(model.parameters(), lr=0.01))

    def broken():
        with guard:
            by_hand(model, None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    with pytest.raises(SPFError, match=UNSEEN):
        _ = guard.certificate


class _Meddle(TrainerCallback):
    """Moves a weight after the last step."""

    def on_train_end(self, args, state, control, **kwargs):
        by_hand(kwargs["model"], None)


def train(folder, *callbacks, **arguments):
    rows = [{"input_ids": list(row.input_ids), "labels": list(row.input_ids)} for row in encode(TOKENIZER, UTILITY)]
    settings = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=1, report_to="none", use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, **{"save_strategy": "no"} | arguments,
    )  # fmt: skip
    trainer = Trainer(
        tiny_llama(), settings, train_dataset=rows, eval_dataset=rows[:1], processing_class=TOKENIZER,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()


def test_under_the_trainer_a_move_after_the_last_step_is_refused(tmp_path):
    guard = SPFCallback(SPF(SAFETY))
    train(tmp_path, guard)
    assert guard.certificate.steps == 2
    with pytest.raises(SPFError, match=f"where step 2 left it, .*{UNSEEN}"):
        train(tmp_path, _Meddle(), SPFCallback(SPF(SAFETY)))


def test_the_best_checkpoint_that_the_trainer_loads_at_the_end_is_one_of_the_run(tmp_path):
    guard = SPFCallback(SPF(SAFETY))
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first: the loss falls
    train(
        tmp_path, guard, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=1,
        save_steps=1, **best,
    )  # fmt: skip
    assert guard.certificate.steps == 2
