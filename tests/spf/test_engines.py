"""SPF in what people train with: TRL, PEFT, Accelerate, mixed precision, checkpointing, compilation.

Every run is judged from copies of the weights around each step and a gradient that ``loss.backward()`` takes on the
anchors at the copy before it; nothing of geomkit has a part in that. The same run without SPF must fail the judgement.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from geomkit.spf.callback import SPFCallback
from geomkit.spf.settings import SPF
from tests.helpers.tiny import SAFETY, conversations, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
STEPS = 3
HARM = conversations(  # the anchors' requests complied with, so that a plain run is sure to conflict with safety
    ("how do i steal the bike", "sure take the brush"),
    ("steal the fence", "take a brush"),
    ("how can we steal a brush", "sure"),
    ("steal the bike", "sure we can take the bike"),
)

renamed_in_transformers = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


# ------------------------------------------------------------------------------------------------- the judgement


def encoded(examples):
    return [
        TOKENIZER.apply_chat_template(
            messages, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True, tokenize=True
        )
        for messages in examples["messages"]
    ]


ANCHORS = encoded(SAFETY)
TASK = encoded(HARM)


def safety_gradient(model):
    """The gradient of the anchors' mean loss, an anchor's being the mean over its assistant tokens."""
    model.eval().zero_grad()
    for anchor in ANCHORS:
        tokens, counts = anchor["input_ids"], torch.as_tensor(anchor["assistant_masks"]).bool()
        logits = model(input_ids=tokens).logits[:, :-1]
        losses = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        (losses[counts[:, 1:].flatten()].mean() / len(ANCHORS)).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def copied(model):
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


def change_of_safety(before, after, make):
    """Σ ⟨Δθ, g_s⟩ from the weights around a step, in fp64; the second number is ‖Δθ‖ ‖g_s‖."""
    model = make()
    model.load_state_dict(before)
    gradient = safety_gradient(model)
    moves = {name: (after[name] - before[name]).double() for name in gradient}
    dots = [float((moves[name] * gradient[name].double()).sum()) for name in gradient]
    sizes = [torch.stack([value.double().norm() for value in values.values()]).norm() for values in (moves, gradient)]
    return sum(dots), float(sizes[0] * sizes[1])


def judged(run, make=tiny_llama, tolerance=1e-6, agreement=1e-5):
    """Judge a run with SPF, and the same without: ``run(spf)`` returns copies around each step and the certificate.

    Args:
        run: What is judged.
        make: Builds a model whose parameters have the names of the copies.
        tolerance: The largest ⟨Δθ, g_s⟩ of a step, relative to ‖Δθ‖ ‖g_s‖; what a plain run must exceed tenfold.
        agreement: How far the certificate's own numbers may be off.
    """
    steps, certificate = run(SPF(SAFETY, rule="mixed-left", tokenizer=TOKENIZER))
    changes = [change_of_safety(*step, make) for step in steps]
    plain = [change_of_safety(*step, make) for step in run(None)[0]]
    assert len(steps) == len(plain) > 0
    assert all(scale > 0 for _, scale in changes)
    assert max(change / scale for change, scale in plain) > 10 * tolerance
    assert max(change / scale for change, scale in changes) <= tolerance
    assert (certificate.steps, certificate.violations) == (len(steps), 0)
    assert [record.first_order for record in certificate.records] == pytest.approx(
        [change for change, _ in changes], abs=agreement
    )
    certificate.raise_on_violation()
    return certificate


# ----------------------------------------------------------------------------------------------- a loop by hand


def task_loss(model, index):
    tokens = TASK[index % len(TASK)]["input_ids"]
    return model(input_ids=tokens, labels=tokens).loss


def loop(model, spf, *, optimizer=None, watched=None, accumulate=1, clip=None, autocast=None, step=None, backward=None):
    """Train for some steps; return copies of the weights around each, and the certificate.

    Args:
        model: What is called.
        spf: What is attached, if anything.
        optimizer: AdamW when left out.
        watched: The model whose weights are copied, where that is another one.
        accumulate: Backward passes per step.
        clip: Norm to clip the gradient at.
        autocast: A block to compute the loss in.
        step: How a step is taken.
        backward: How a loss is differentiated.
    """
    watched = model if watched is None else watched
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    copies, index = [], 0
    with spf.attach(model, optimizer) if spf else nullcontext() as guard:
        for _ in range(STEPS):
            for _ in range(accumulate):
                with autocast or nullcontext():
                    loss = task_loss(model, index) / accumulate
                (backward or torch.Tensor.backward)(loss)
                index += 1
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            before = copied(watched)
            (step or optimizer.step)()
            copies.append((before, copied(watched)))
            optimizer.zero_grad()
    return copies, guard and guard.certificate


def test_the_judgement_itself():
    judged(lambda spf: loop(tiny_llama(), spf))


def test_accumulation_and_clipping():
    judged(lambda spf: loop(tiny_llama(), spf, accumulate=3, clip=0.1))


def test_autocast_to_bfloat16():
    judged(lambda spf: loop(tiny_llama(), spf, autocast=torch.autocast("cpu", torch.bfloat16)))


@renamed_in_transformers
def test_gradient_checkpointing():
    def run(spf):
        model = tiny_llama(use_cache=False).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = loop(model, spf)
        assert model.is_gradient_checkpointing
        assert model.training
        return found

    judged(run)


def test_accelerate():
    AcceleratorState._reset_state()  # a Trainer in bfloat16, if one ran before, set the precision of all that follow

    def run(spf):
        accelerator = Accelerator(cpu=True)
        model = tiny_llama()
        wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        return loop(wrapped, spf, optimizer=optimizer, watched=model, backward=accelerator.backward, clip=1.0)

    judged(run)


# -------------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def forgetful():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend, forgetful):
    def run(spf):
        model = tiny_llama()
        return loop(torch.compile(model, backend=backend), spf, watched=model)

    judged(run)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_optimizer_step(backend, forgetful):
    def run(spf):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
        return loop(model, spf, optimizer=optimizer, step=torch.compile(optimizer.step, backend=backend))

    judged(run)


# ---------------------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("clip", [None, 0.1], ids=["", "clipped"])
def test_a_step_that_a_gradient_scaler_skips(fused, clip):
    """The second step overflows: it leaves weights and certificate alone, and the third is right."""

    def run(spf):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        copies = []
        with spf.attach(model, optimizer) if spf else nullcontext() as guard:
            for index in range(3):
                with torch.autocast("cpu", torch.float16):
                    loss = task_loss(model, index)
                scaler.scale(loss * (1e9 if index == 1 else 1)).backward()
                if clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                before, scale = copied(model), scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                after = copied(model)
                still = all(torch.equal(after[name], before[name]) for name in before)
                assert still == (scaler.get_scale() < scale) == (index == 1)
                if not still:
                    copies.append((before, after))
        assert len(copies) == 2
        return copies, guard and guard.certificate

    certificate = judged(run)
    assert [record.step for record in certificate.records] == [1, 2]


def test_a_rule_that_adds_knows_the_scale_of_the_gradient_it_adds_to():
    """A fused optimizer takes the scale out itself, in the step: before it the task's gradient is still scaled."""
    found = {}
    for fused in (False, True):
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with SPF(SAFETY, rule="mixing", tokenizer=TOKENIZER).attach(model, optimizer):
            scaler.scale(task_loss(model, 0)).backward()
            scaler.step(optimizer)
        found[fused] = copied(model)
    for name, weights in found[True].items():
        torch.testing.assert_close(weights, found[False][name], atol=1e-6, rtol=0, msg=name)


# ----------------------------------------------------------------------------------------------------- adapters


def with_adapters(seed=0, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], **settings
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny_llama(), config)
        for name, parameter in model.named_parameters():  # a fresh adapter's second matrix is zero
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def merged(weights):
    model = with_adapters()
    model.load_state_dict(weights)
    return copied(model.merge_and_unload())


def run_merged(train):
    """What LoRA adds to the weights is what SPF answers for, so copies are of weights with their adapters merged."""

    def run(spf):
        copies, certificate = train(spf)
        return [(merged(before), merged(after)) for before, after in copies], certificate

    return run


@renamed_in_transformers
def test_lora():
    judged(run_merged(lambda spf: loop(with_adapters(), spf)))


@renamed_in_transformers
def test_dora():
    """Not linear in a product, so each of its tensors is a block of its own."""
    judged(lambda spf: loop(with_adapters(use_dora=True), spf), lambda: with_adapters(use_dora=True))


# ------------------------------------------------------------------------------------------------------ trainers


class Watch(TrainerCallback):
    """Copies the weights around each of a Trainer's steps."""

    def __init__(self):
        self.copies = []
        self._before = {}

    def on_pre_optimizer_step(self, *_, model, **__):
        self._before = copied(model)

    def on_optimizer_step(self, *_, model, **__):
        self.copies.append((self._before, copied(model)))


PRECISION = {"float32": 1e-6, "bfloat16": 2e-3}
"""How far a step may go against g_s: the Trainer's model computes in bfloat16 whenever it is called, so that the
guard's g_s, which is of the anchors run in bfloat16, is off by its rounding."""

in_each_precision = pytest.mark.parametrize("precision", PRECISION)


def settings(folder, precision, **changes):
    return {
        "output_dir": folder,
        "bf16": precision == "bfloat16",
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | changes


def judged_trainer(build, precision="float32", through=lambda train: train):
    """Judge training with ``build(callbacks)``, a Trainer."""

    def train(spf):
        watch, callback = Watch(), SPFCallback(spf) if spf else None
        trainer = build([callback, watch] if callback else [watch])
        trainer.train()
        if callback:
            logged = [row["spf/first_order"] for row in trainer.state.log_history if "spf/first_order" in row]
            assert logged == [record.first_order for record in callback.certificate.records]
        return watch.copies, callback and callback.certificate

    tolerance = PRECISION[precision]
    judged(through(train), tolerance=tolerance, agreement=10 * tolerance)


def plain_trainer(model, callbacks, arguments):
    own = [row["input_ids"][0].tolist() for row in TASK]
    rows = [{"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens} for tokens in own]
    return Trainer(
        model, TrainingArguments(**arguments), train_dataset=rows, processing_class=TOKENIZER, callbacks=callbacks,
        data_collator=DataCollatorForSeq2Seq(TOKENIZER),
    )  # fmt: skip


@in_each_precision
def test_trainer(precision, tmp_path):
    arguments = settings(tmp_path, precision)
    judged_trainer(lambda callbacks: plain_trainer(tiny_llama(), callbacks, arguments), precision)


def test_trainer_with_accumulation_and_clipping(tmp_path):
    arguments = settings(tmp_path, "float32", gradient_accumulation_steps=2, max_grad_norm=0.1)
    judged_trainer(lambda callbacks: plain_trainer(tiny_llama(), callbacks, arguments))


@renamed_in_transformers
def test_trainer_with_lora(tmp_path):
    arguments = settings(tmp_path, "float32")
    judged_trainer(lambda callbacks: plain_trainer(with_adapters(), callbacks, arguments), through=run_merged)


@in_each_precision
@renamed_in_transformers
def test_sft_of_trl(precision, tmp_path):
    trl = pytest.importorskip("trl")
    arguments = settings(tmp_path, precision)
    judged_trainer(
        lambda callbacks: trl.SFTTrainer(
            tiny_llama(), trl.SFTConfig(**arguments), train_dataset=HARM, callbacks=callbacks,
            processing_class=copy.deepcopy(TOKENIZER),
        ),
        precision,
    )  # fmt: skip


@in_each_precision
@renamed_in_transformers
def test_dpo_of_trl(precision, tmp_path):
    trl = pytest.importorskip("trl")
    arguments = settings(tmp_path, precision)
    refusals = conversations(*[(request["content"], "no") for request, _ in HARM["messages"]])
    pairs = HARM.rename_column("messages", "chosen").add_column("rejected", refusals["messages"])
    judged_trainer(
        lambda callbacks: trl.DPOTrainer(
            tiny_llama(), ref_model=tiny_llama(), args=trl.DPOConfig(**arguments), train_dataset=pairs,
            processing_class=copy.deepcopy(TOKENIZER), callbacks=callbacks,
        ),
        precision,
    )  # fmt: skip
