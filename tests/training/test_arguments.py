"""Arguments of transformers reach the Trainer, and arguments that would not are refused in one line."""

import copy
import sys
import types
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from geomkit.errors import DataError
from geomkit.inputs.tokens import encode
from geomkit.spf.settings import SPF
from geomkit.training.arguments import (
    _GEOMKIT_NAMES,
    _OWN_NAMES,
    _RENAMED,
    _WITHOUT_EFFECT,
    check_arguments,
    make_arguments,
    refusals_in_one_line,
    with_defaults,
)
from geomkit.training.finetune import finetune
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUICK = {"steps": 3, "learning_rate": 1e-2, "batch_size": 4, "progress": False}


def train(model=None, spf=None, **arguments):
    return finetune(model or tiny_llama(), TOKENIZER, UTILITY, spf, **QUICK | arguments)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def distance(a, b):
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def refusal(**arguments):
    """The message with which a fine-tune refuses arguments."""
    with pytest.raises(DataError) as caught:
        train(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("weigth_decay", "weight_decay"),
        ("learning_rates", "learning_rate"),
        ("stpes", "steps"),
        ("epoch", "epochs"),
        ("batchsize", "batch_size"),
        ("max_step", "steps"),
        ("checkpoint", "checkpoints"),
        ("warmup_ratio", "warmup_steps"),
        ("save_step", "save_steps"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_nearest_known_name(wrong, meant):
    assert f"expected an argument of transformers.TrainingArguments, found {wrong}=; did you mean {meant}=?" == refusal(
        **{wrong: 1}
    )


def test_an_argument_that_resembles_none_points_to_the_documentation():
    assert refusal(xyzzy=1).endswith("found xyzzy=; see transformers.TrainingArguments")


@pytest.mark.parametrize(("theirs", "ours"), _GEOMKIT_NAMES.items())
def test_geomkits_own_names_are_asked_for(theirs, ours):
    assert refusal(**{theirs: "x"}) == f"expected {ours}=, found {theirs}=; write {ours}='x'"


@pytest.mark.parametrize("name", [name for names in _WITHOUT_EFFECT.values() for name in names])
def test_arguments_without_effect_are_refused_with_the_reason(name):
    reason = next(reason for reason, names in _WITHOUT_EFFECT.items() if name in names)
    assert refusal(**{name: True}) == f"expected no argument {name}=, found {name}=True; {reason}"


def test_the_tables_name_arguments_that_exist():
    """A name that transformers gave up would be refused as unknown, with a nearer name, if it were not in a table."""
    known = {field.name for field in fields(TrainingArguments) if field.init}
    assert {name for names in _WITHOUT_EFFECT.values() for name in names} <= known
    assert set(_GEOMKIT_NAMES.values()) <= {*known, *_OWN_NAMES}
    assert set(_RENAMED) <= known


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"save_strategy": "epoch"}, "save_strategy='epoch'"),
        ({"report_to": "tensorboard"}, "report_to='tensorboard'"),
        ({"report_to": ["tensorboard"]}, "report_to=['tensorboard']"),
        ({"report_to": "all"}, "report_to='all'"),
    ],
)
def test_what_writes_files_needs_a_folder(arguments, where):
    message = f"expected checkpoints= to say where {where} writes to, found none; give a folder"
    assert refusal(**arguments) == message
    check_arguments(arguments, "folder")


@pytest.mark.parametrize(
    "off",
    [
        {"save_strategy": "no"},
        {"save_strategy": TrainingArguments("x", save_strategy="no").save_strategy},
        {"report_to": "none"},
        {"report_to": ["none"]},
        {"report_to": []},
    ],
    ids=str,
)
def test_what_writes_nothing_needs_no_folder(off):
    check_arguments(off, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lr_scheduler_type": "nope"}, "nope is not a valid SchedulerType"),
        ({"optim": "nope"}, "nope is not a valid OptimizerNames"),
        ({"save_strategy": "nope", "checkpoints": "run"}, "nope is not a valid SaveStrategy"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"fp16": True, "bf16": True, "use_cpu": True}, "At most one of fp16 and bf16"),
        ({"report_to": "nope", "checkpoints": "run"}, "nope is not supported"),
        ({"report_to": "tensorboard", "checkpoints": "run"}, "TensorBoardCallback requires tensorboard"),
        ({"seed": None}, "NoneType"),
    ],
    ids=str,
)
def test_what_transformers_refuses_gets_one_line(tmp_path, monkeypatch, arguments, said):
    """Some of these are found when the arguments are made, some in the Trainer, some when it sets up its optimizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    model = tiny_llama()
    before = copy.deepcopy(model)
    message = refusal(model=model, inplace=True, **arguments)
    assert message.startswith("expected training arguments that transformers can work with, found: ")
    assert said in message
    assert same(model, before)
    assert model.config.use_cache
    assert "no checkpoint is the best" in refusal(save_strategy="best", checkpoints="run")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"steps": "3"}, "expected steps= as a whole number of at least 1, such as 100, or None, found '3'; give one"),
        ({"steps": 2.5}, "found 2.5"),
        ({"steps": 0}, "found 0"),
        ({"steps": True}, "found True"),
        ({"steps": None, "epochs": "1"}, "expected epochs= as a number above 0, such as 3, found '1'"),
        ({"steps": None, "epochs": None}, "found None"),
        ({"steps": None, "epochs": float("nan")}, "found nan"),
        ({"steps": None, "epochs": float("inf")}, "found inf"),
        ({"batch_size": 2.5}, "expected batch_size= as a whole number of at least 1, such as 16, found 2.5"),
        ({"learning_rate": "1e-4"}, "expected learning_rate= as a number, such as 2e-5, found '1e-4'"),
        ({"learning_rate": None}, "found None"),
        ({"fp16": True, "use_cpu": True}, "expected a GPU for fp16=True, found a CPU"),
    ],
    ids=str,
)
def test_amounts_and_precisions_that_cannot_be_are_refused_in_one_line(arguments, said):
    assert said in refusal(**arguments)


def test_numbers_of_numpy_are_numbers():
    assert len(train(steps=np.int64(1), learning_rate=np.float32(1e-3)).history) == 1
    assert len(train(steps=None, epochs=np.float64(0.5)).history) == 1


def test_an_error_after_the_training_began_is_no_refusal():
    class Broken(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        train(callbacks=[Broken()])


def test_trouble_with_memory_is_no_refusal():
    with pytest.raises(torch.OutOfMemoryError, match="full"), refusals_in_one_line():
        raise torch.OutOfMemoryError("full")


# ------------------------------------------------------------------------------------------------- defaults


def test_defaults_are_those_that_are_documented():
    arguments = make_arguments(
        "x", steps=None, epochs=2, batch_size=3, learning_rate=0.5, more=with_defaults({}, save=True)
    )
    assert (arguments.seed, arguments.optim, arguments.logging_steps) == (0, "adamw_torch", 1)
    assert (arguments.save_strategy, arguments.save_steps, arguments.save_total_limit) == ("steps", 100, 2)
    assert arguments.report_to == []
    assert (arguments.max_steps, arguments.num_train_epochs) == (-1, 2)
    assert (arguments.per_device_train_batch_size, arguments.learning_rate) == (3, 0.5)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps, arguments.weight_decay) == ("linear", 0, 0)
    assert (arguments.gradient_accumulation_steps, arguments.max_grad_norm) == (1, 1)
    assert (arguments.bf16, arguments.fp16, arguments.activation_checkpointing) == (False, False, False)
    assert with_defaults({}, save=False)["save_strategy"] == "no"


def test_a_default_gives_way_to_the_user_and_a_fixed_argument_does_not():
    given = {"seed": 7, "save_strategy": "epoch", "save_total_limit": None, "remove_unused_columns": True}
    arguments = make_arguments(
        "x", steps=4, epochs=2, batch_size=3, learning_rate=0.5, more=with_defaults(given, save=True)
    )
    assert (arguments.seed, arguments.save_strategy, arguments.save_total_limit) == (7, "epoch", None)
    assert arguments.remove_unused_columns is False
    assert arguments.max_steps == 4


# ----------------------------------------------------------------------------------------------- end to end


def by_hand(arguments, **wanted):
    """The reference: a plain Trainer with the same arguments, on rows that are dicts, padded by its own collator."""
    rows = [{"input_ids": list(row.input_ids), "labels": labels(row)} for row in encode(TOKENIZER, UTILITY)]
    model = tiny_llama()
    settings = TrainingArguments(
        max_steps=3, learning_rate=1e-2, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, **{"seed": 0, "per_device_train_batch_size": 4, **arguments, **wanted},
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=padded)
    trainer.train()
    return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def labels(row):
    return [token if scored else -100 for token, scored in zip(row.input_ids, row.loss_mask, strict=True)]


def padded(rows):
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return batch | {"attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight_decay": 0.3},
        {"warmup_steps": 2, "lr_scheduler_type": "cosine"},
        {"optim": "sgd", "lr_scheduler_type": "constant"},
        {"optim": "adafactor"},
        {"max_grad_norm": 0.01, "adam_beta2": 0.9},
        {"seed": 5, "per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.1},
        {"bf16": True, "use_cpu": True},
    ],
    ids=str,
)
def test_a_run_equals_that_of_a_plain_trainer_with_the_same_arguments(tmp_path, arguments):
    expected, losses = by_hand(arguments, output_dir=tmp_path)
    ours = {"batch_size" if name == "per_device_train_batch_size" else name: arguments[name] for name in arguments}
    result = train(**ours)
    assert result.history["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    assert distance(result.model, expected) < 1e-5
    assert distance(result.model, train().model) > 1e-3  # the argument has an effect


def test_warmup_decay_and_the_schedule_by_hand():
    """AdamW in a loop: learning rates 0, ½ and 1 of the peak, decay on all but the norms' weights."""
    model = tiny_llama()
    result = train(model, weight_decay=0.3, warmup_steps=2, lr_scheduler_type="constant_with_warmup")
    norms = [weight for name, weight in model.named_parameters() if "norm" in name]
    others = [weight for name, weight in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": 0.3}, {"params": norms, "weight_decay": 0}])
    rates = [0.0, 5e-3, 1e-2]
    rows = [{"input_ids": list(row.input_ids), "labels": labels(row)} for row in encode(TOKENIZER, UTILITY)]
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()(**padded(rows)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert result.history["learning_rate"].tolist() == pytest.approx(rates)
    for (name, found), wanted in zip(result.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0, msg=name)


def settings_of(model):
    """What the Trainer changes in a model for training alone: attributes of its modules, hooks, and use_cache."""
    return [
        (set(vars(module)) - {"_is_accelerate_prepared"}, len(module._forward_hooks), checkpointed(module))
        for module in model.modules()
    ] + [model.config.use_cache]


def checkpointed(module):
    return getattr(module, "gradient_checkpointing", None)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("spf", [None, SPF(SAFETY)], ids=["plain", "SPF"])
def test_gradient_checkpointing_changes_nothing_and_is_off_again_afterwards(name, spf):
    class Seen(TrainerCallback):
        def on_step_end(self, *_, **kwargs):
            on.append(kwargs["model"].is_activation_checkpointing)

    on, model = [], tiny_llama()
    before = settings_of(model)
    result = train(model, spf, inplace=True, callbacks=[Seen()], **{name: True})
    assert on == [True] * 3
    assert settings_of(model) == before
    assert not model.is_activation_checkpointing
    assert same(model, train(spf=spf).model)
    assert result.certificate is None or result.certificate.violations == 0


@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": True}], ids=str)
def test_a_model_with_gradient_checkpointing_keeps_it(given):
    model = tiny_llama()
    model.config.use_cache = False
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    flags = [checkpointed(module) for module in model.modules()]
    train(model, inplace=True, **given)
    assert [checkpointed(module) for module in model.modules()] == flags
    assert model.config.use_cache is False
    assert model.is_activation_checkpointing


@pytest.mark.parametrize("arguments", [{"bf16": True, "use_cpu": True}, {"neftune_noise_alpha": 5.0}], ids=str)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_trained_model_computes_as_its_saved_checkpoint_does(arguments, interrupted):
    """Mixed precision replaces the model's ``forward``, and noise is a hook on the embedding."""

    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            if interrupted:
                raise KeyboardInterrupt

    model = tiny_llama()
    before = settings_of(model)
    try:
        train(model, inplace=True, callbacks=[Stop()], **arguments)
    except KeyboardInterrupt:
        assert interrupted
    assert settings_of(model) == before
    plain = tiny_llama()
    plain.load_state_dict(model.state_dict())
    tokens = torch.tensor([[2, 5, 6, 7]])
    assert torch.equal(model.train()(tokens).logits, plain.train()(tokens).logits)
    assert same(train(copy.deepcopy(model)).model, train(plain).model)


def test_mixed_precision_needs_to_be_told_of_a_cpu(monkeypatch):
    from transformers import training_args

    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: False)
    assert "use_cpu" in refusal(bf16=True)


def test_spf_keeps_its_promise_under_all_of_them_at_once():
    arguments = {
        "bf16": True, "use_cpu": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
        "batch_size": 2, "weight_decay": 0.1, "warmup_steps": 1, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    result = train(spf=SPF(SAFETY, rule="rank1"), **arguments)
    assert (result.certificate.steps, result.certificate.violations) == (3, 0)
    assert any(record.fired for record in result.certificate.records)


def test_a_checkpoint_after_every_epoch(tmp_path):
    arguments = {"steps": None, "epochs": 3, "batch_size": 2, "save_strategy": "epoch", "save_total_limit": None}
    train(checkpoints=tmp_path, **arguments)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 6)]
    train(checkpoints=tmp_path, **arguments)  # finished: nothing is left to do
    with pytest.raises(DataError, match="to go on with save_strategy='epoch', found 'steps'"):
        train(checkpoints=tmp_path, **arguments | {"save_strategy": "steps"})


@pytest.mark.parametrize("spf", [None, SPF(SAFETY, anchors_per_step=2)], ids=["plain", "SPF"])
def test_an_interrupted_run_with_these_arguments_ends_where_an_uninterrupted_one_does(tmp_path, spf):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    arguments = {
        "steps": None, "epochs": 3, "batch_size": 1, "gradient_accumulation_steps": 2, "save_strategy": "epoch",
        "weight_decay": 0.2, "warmup_steps": 2, "lr_scheduler_type": "cosine", "bf16": True, "use_cpu": True,
        "gradient_checkpointing": True, "seed": 3,
    }  # fmt: skip
    model = tiny_llama(attention_dropout=0.1)
    whole = train(model, spf, checkpoints=tmp_path / "whole", **arguments)
    with pytest.raises(KeyboardInterrupt):
        train(model, spf, checkpoints=tmp_path / "broken", callbacks=[Stop()], **arguments)
    resumed = train(model, spf, checkpoints=tmp_path / "broken", **arguments)
    assert same(whole.model, resumed.model)
    assert resumed.history["loss"].tolist() == whole.history["loss"].tolist()
    assert resumed.history["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_losses_are_reported_to_tensorboard(tmp_path, monkeypatch):
    """tensorboard itself is not needed: the callback of transformers writes to a stub."""
    written = []

    class SummaryWriter:
        def __init__(self, log_dir=None):
            self.log_dir = log_dir

        def add_scalar(self, name, value, step):
            written.append((name, float(value), step))

        def __getattr__(self, _):
            return lambda *_, **__: None

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    result = train(spf=SPF(SAFETY), checkpoints=tmp_path / "run", report_to="tensorboard")
    for name, column in (("train/loss", "loss"), ("train/learning_rate", "learning_rate")):
        reported = [(step, value) for label, value, step in written if label == name]
        assert reported == list(zip(result.history["step"], result.history[column], strict=True))
    plain = train(spf=SPF(SAFETY))
    assert same(plain.model, result.model)


def test_a_history_has_the_logged_steps_and_the_bar_all_steps(capsys):
    result = train(logging_steps=2, progress=True)
    assert result.history["step"].tolist() == [2]
    assert "3/3" in capsys.readouterr().err
    silent = train(logging_strategy="no", progress=True)
    assert len(silent.history) == 0
    assert "3/3" in capsys.readouterr().err
    assert silent.plot().data
    assert "3 steps" in silent._repr_html_()
