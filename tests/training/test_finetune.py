"""The included loop trains as a loop by hand would, holds SPF's promise, and leaves everything else alone."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from geomkit.errors import DataError, GeomkitError, SPFError
from geomkit.inputs.batches import batches
from geomkit.inputs.tokens import encode
from geomkit.spf.callback import SPFCallback
from geomkit.spf.settings import SPF
from geomkit.training.finetune import finetune
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUICK = {"steps": 3, "learning_rate": 1e-2, "batch_size": 4, "lr_scheduler_type": "constant", "progress": False}


def by_hand(model, spf=None, *, steps=3, split=1):
    """The reference: AdamW on the whole set, the mean over all assistant tokens, the gradient's norm clipped at 1."""
    groups = {
        decay: [weight for name, weight in model.named_parameters() if ("norm" in name) == (decay == 0)]
        for decay in (0.1, 0.0)
    }
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay} for decay, weights in groups.items()], lr=1e-2
    )
    guard = spf.attach(model, optimizer) if spf else None
    rows = encode(TOKENIZER, UTILITY)
    tokens = sum(row.loss_tokens for row in rows)
    losses = []
    for _ in range(steps):
        total = 0.0
        for batch in batches(rows, 0, len(rows) // split):
            mean = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            share = mean * int((batch.labels[:, 1:] >= 0).sum()) / tokens
            share.backward()
            total += float(share.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, guard


def assert_same_weights(found, wanted):
    for (name, a), b in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0, msg=name)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(parameter, held) for parameter, held in zip(model.parameters(), before, strict=True))


# ------------------------------------------------------------------------------------------------- training


def test_a_plain_run_equals_a_loop_by_hand():
    """Full batches, so that the order of the data does not matter; weights to 2e-6, losses to 1e-6."""
    model = tiny_llama()
    expected = copy.deepcopy(model).train()
    losses, _ = by_hand(expected)
    result = finetune(model, TOKENIZER, UTILITY, weight_decay=0.1, **QUICK)
    assert_same_weights(result.model, expected)
    assert result.history["loss"].tolist() == pytest.approx(losses, rel=1e-6)
    assert result.history["step"].tolist() == [1, 2, 3]
    assert {"learning_rate", "grad_norm"} <= set(result.to_frame())
    assert result.certificate is None


def test_accumulation_weighs_every_assistant_token_alike():
    model = tiny_llama()
    expected = copy.deepcopy(model).train()
    by_hand(expected, split=2)
    options = QUICK | {"batch_size": 2, "gradient_accumulation_steps": 2}
    result = finetune(model, TOKENIZER, UTILITY, SPF(SAFETY, rule="monitor"), weight_decay=0.1, **options)
    assert_same_weights(result.model, expected)
    assert result.certificate.steps == 3


def test_a_run_under_spf_equals_a_loop_by_hand_and_keeps_its_promise():
    model = tiny_llama()
    expected = copy.deepcopy(model).train()
    spf = SPF(SAFETY, rule="rank1", tokenizer=TOKENIZER)
    _, guard = by_hand(expected, spf)
    result = finetune(model, TOKENIZER, UTILITY, spf, weight_decay=0.1, **QUICK)
    assert_same_weights(result.model, expected)
    assert (result.certificate.steps, result.certificate.violations) == (3, 0)
    found, wanted = result.certificate.records[-1], guard.certificate.records[-1]
    assert found.first_order == pytest.approx(wanted.first_order, abs=1e-5)
    assert found.fired == wanted.fired > 0


def test_the_history_has_spfs_measures_of_every_step():
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY), **QUICK)
    records = result.certificate.records
    assert result.history["spf/anchor_loss"].tolist() == [record.anchor_loss for record in records]
    assert result.history["spf/first_order"].tolist() == [record.first_order for record in records]
    assert result.history["spf/fired"].tolist() == [record.fired for record in records]
    assert "rule 'adaptive-kl-left': 0 of 3 steps" in result._repr_html_()


def test_the_number_of_steps_is_known_where_few_are_logged():
    for logging_steps in (2, 10):
        result = finetune(tiny_llama(), TOKENIZER, UTILITY, logging_steps=logging_steps, **QUICK)
        assert result.steps == QUICK["steps"]
        assert str(result).startswith("Fine-tune of 3 steps")


def test_numbers_of_numpy_are_numbers_also_in_the_settings_of_a_run(tmp_path):
    own = {"steps": np.int64(2), "batch_size": np.int64(2), "learning_rate": np.float32(0.5), "save_steps": np.int64(1)}
    numbers = {name: value.item() for name, value in own.items()}
    first = finetune(tiny_llama(), TOKENIZER, UTILITY, seed=np.int64(3), checkpoints=tmp_path, progress=False, **own)
    again = finetune(tiny_llama(), TOKENIZER, UTILITY, seed=3, checkpoints=tmp_path, progress=False, **numbers)
    assert unchanged(again.model, weights(first.model))


def test_a_single_callback_is_refused_with_the_form_that_is_taken():
    with pytest.raises(DataError, match=r"expected a list of callbacks, .* give callbacks=\[…\]"):
        finetune(tiny_llama(), TOKENIZER, UTILITY, callbacks=TrainerCallback(), **QUICK)


def test_epochs_seed_and_length():
    options = QUICK | {"steps": None, "batch_size": 3}
    runs = [finetune(tiny_llama(), TOKENIZER, UTILITY, epochs=2, seed=seed, **options) for seed in (0, 0, 1)]
    assert [len(run.history) for run in runs] == [4, 4, 4]
    assert unchanged(runs[0].model, weights(runs[1].model))
    assert not unchanged(runs[0].model, weights(runs[2].model))
    with pytest.raises(DataError, match="found none within the first 3 tokens"):
        finetune(tiny_llama(), TOKENIZER, encode(TOKENIZER, UTILITY, max_length=3), **QUICK)


# -------------------------------------------------------------------------------------------------- manners


def test_a_copy_is_trained_and_the_model_stays_as_found():
    model = tiny_llama().train()
    before, config = weights(model), model.config.to_dict()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    result = finetune(model, TOKENIZER, UTILITY, SPF(SAFETY), **QUICK)
    assert result.model is not model
    assert unchanged(model, before)
    assert not unchanged(result.model, before)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert model.training
    assert model.config.to_dict() == config
    assert not result.model.training
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_training_in_place_gives_the_same_weights_in_the_model_itself():
    model = tiny_llama()
    copied = finetune(model, TOKENIZER, UTILITY, **QUICK)
    result = finetune(model, TOKENIZER, UTILITY, inplace=True, **QUICK)
    assert result.model is model
    assert unchanged(model, weights(copied.model))


def test_global_random_states_are_kept():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    finetune(tiny_llama(attention_dropout=0.5), TOKENIZER, UTILITY, **QUICK)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    state = random.getstate()
    with pytest.raises(GeomkitError, match="step 1: expected a finite training loss, found nan; lower the learning"):
        finetune(model, TOKENIZER, UTILITY, **QUICK)
    with pytest.raises(GeomkitError, match=r"expected a finite gradient before optimizer\.step"):
        finetune(model, TOKENIZER, UTILITY, SPF(SAFETY, rule="rank1"), **QUICK)
    assert random.getstate() == state
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    with pytest.raises(GeomkitError, match="step 1"):
        finetune(model, TOKENIZER, UTILITY, **QUICK | {"progress": True})
    assert capsys.readouterr().err.endswith("\n")  # the bar is closed


def test_a_run_that_breaks_off_detaches_spf():
    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    kept = {}

    class Keep(TrainerCallback):
        def on_train_begin(self, *_, **kwargs):
            kept.update(kwargs)

    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, TOKENIZER, UTILITY, SPF(SAFETY), inplace=True, callbacks=[Keep(), Stop()], **QUICK)
    inner = kept["optimizer"]
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks


@pytest.mark.parametrize("rate", [1e10, 1e30])
def test_a_model_that_the_last_step_ruined_is_refused(rate):
    with pytest.raises(GeomkitError, match=r"after training, found .*; lower the learning rate or train in fp32"):
        finetune(tiny_llama(), TOKENIZER, UTILITY, **QUICK | {"steps": 1, "learning_rate": rate})


def test_a_weight_that_is_not_finite_is_named_though_the_loss_does_not_show_it():
    class Spoil(TrainerCallback):
        def on_train_end(self, *_, **kwargs):
            kwargs["model"].spare.bias.data[0] = torch.inf

    model = tiny_llama()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(GeomkitError, match=r"spare.bias: expected finite weights after training"):
        finetune(model, TOKENIZER, UTILITY, callbacks=[Spoil()], **QUICK)


@pytest.mark.parametrize("training", [False, True])
def test_a_run_that_breaks_off_leaves_the_modes_as_found(training):
    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    model = tiny_llama().train(training)
    model.model.layers[0].train(not training)
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        finetune(model, TOKENIZER, UTILITY, inplace=True, callbacks=[Stop()], **QUICK)
    assert [module.training for module in model.modules()] == modes


# ---------------------------------------------------------------------------------------- in another's Trainer


def test_the_callback_serves_a_plain_trainer(tmp_path):
    rows = [
        {"input_ids": list(row.input_ids), "attention_mask": [1] * len(row), "labels": list(row.input_ids)}
        for row in encode(TOKENIZER, UTILITY)
    ]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=1, learning_rate=1e-2, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    callback = SPFCallback(SPF(SAFETY))
    assert callback.certificate is None
    trainer = Trainer(tiny_llama(), arguments, train_dataset=rows, processing_class=TOKENIZER, callbacks=[callback])
    trainer.train()
    assert (callback.certificate.steps, callback.certificate.violations) == (2, 0)
    assert [row["spf/fired"] for row in trainer.state.log_history[:2]] == [
        r.fired for r in callback.certificate.records
    ]
    bare = Trainer(tiny_llama(), arguments, train_dataset=rows, callbacks=[SPFCallback(SPF(SAFETY))])
    with pytest.raises(SPFError, match="expected a tokenizer"):
        bare.train()
