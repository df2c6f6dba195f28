"""What each process of ``tests/spf/test_distributed.py`` runs: ``python -m tests.helpers.spf_worker MODE FOLDER``.

It writes what it found to ``FOLDER/RANK.pt``; nothing is judged here.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import distributed as dist
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from geomkit.collection.collect import collect_from_tokens
from geomkit.errors import SPFError
from geomkit.inputs.tokens import encode
from geomkit.spf.callback import SPFCallback
from geomkit.spf.settings import SPF
from geomkit.spf.weights.sharding import gathered, is_sharded, local_rows, process_group, reshard
from tests.helpers.tiny import SAFETY, tiny_llama
from tests.spf.test_engines import HARM, TOKENIZER

ROWS = [list(row.input_ids) for row in encode(TOKENIZER, HARM)]
RULES = (None, "rank1", "two-sided")
STEPS = 3
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
    },
}


def uneven_llama():
    """Two processes cannot share its rows evenly."""
    return tiny_llama(vocab_size=25, intermediate_size=23)


# ------------------------------------------------------------------------------------------------------ training


class Watch(TrainerCallback):
    """Copies the whole weights around each step."""

    def __init__(self):
        self.copies = []
        self._before = {}

    def on_pre_optimizer_step(self, *_, model, **__):
        self._before = whole(model)

    def on_optimizer_step(self, *_, model, **__):
        self.copies.append((self._before, whole(model)))


def whole(model):
    return {
        name: (one.full_tensor() if is_sharded(one) else one).detach().clone() for name, one in model.named_parameters()
    }


def off_by_rounding(model):
    """Have all processes but the first run the anchors a little off, as other hardware would."""
    if dist.get_rank() > 0:
        model.lm_head.register_forward_hook(lambda module, _, output: output if module.training else output * 1.0001)


def train(rule, folder, *, batch=1, prepare=lambda _: None, **engine):
    """Train under a Trainer, with SPF where a rule is given."""
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        logging_strategy="no", **engine,
    )  # fmt: skip
    watch = Watch()
    callback = SPFCallback(SPF(SAFETY, rule=rule, rank=4 if rule == "two-sided" else None)) if rule else None
    model = uneven_llama()
    prepare(model)
    Trainer(
        model, arguments, processing_class=TOKENIZER, data_collator=DataCollatorForSeq2Seq(TOKENIZER),
        train_dataset=[{"input_ids": own, "attention_mask": [1] * len(own), "labels": own} for own in ROWS],
        callbacks=[callback, watch] if callback else [watch],
    ).train()  # fmt: skip
    found = {"copies": watch.copies, "sharded": all(map(is_sharded, model.parameters()))}
    if callback:
        certificate = callback.certificate
        found["records"] = [  # what is not known is NaN, and not equal to itself
            {name: value for name, value in record.numbers().items() if not math.isnan(value)}
            for record in certificate.records
        ]
        found["steps"], found["violations"] = certificate.steps, certificate.violations
    return found


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let accelerate use its FSDP2 with CPUs: of the several ways to run there it knows only the devices' for that."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **settings):
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


# ------------------------------------------------------------------------------------------------------ sharding


def sharded_llama(**options):
    """Shard as accelerate does: layers, the embedding, a group of two modules, and the rest."""
    from torch.distributed.fsdp import fully_shard

    model = uneven_llama()
    for module in (*model.model.layers, model.model.embed_tokens):
        fully_shard(module, **options)
    fully_shard([model.model.norm, model.lm_head], **options | {"reshard_after_forward": False})
    fully_shard(model, **options)
    return model


def loss(model, index):
    tokens = torch.tensor([ROWS[(2 * index + dist.get_rank()) % len(ROWS)]])
    return model(input_ids=tokens, labels=tokens).loss


def anchor_gradients(model):
    return {name: one.dense() for name, one in collect_from_tokens(model, encode(TOKENIZER, SAFETY), 0).items()}


def looked_at(model):
    """Collect inside :func:`gathered`, and check that the block leaves the model and its gradients as they were."""
    parameters = list(model.parameters())
    gradients = [None if one.grad is None else one.grad.to_local().clone() for one in parameters]
    with gathered(model):
        assert not any(map(is_sharded, model.parameters()))
        found = anchor_gradients(model)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad.to_local(), gradient)
    return found


def trained(model, *, look, checkpoint=False, accumulate=1, evaluate=False):
    """Train, and look at the model whenever it is at rest, or never; return its weights and what was seen."""
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = [looked_at(model)] if look else []
    for step in range(2):
        for part in range(accumulate):
            model.set_requires_gradient_sync(part == accumulate - 1)
            loss(model, step * accumulate + part).backward()
            seen += [looked_at(model)] if look else []
        optimizer.step()
        optimizer.zero_grad()
        if evaluate:
            with torch.no_grad():
                loss(model, 0)  # leaves a part of the model whole
        reshard(model)
    return whole(model), seen


def sharding():
    """Say what :mod:`geomkit.spf.weights.sharding` does to models that are sharded in several ways."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    ways = {
        "plain": {},
        "accumulation without sums": {"accumulate": 2},
        "evaluation": {"evaluate": True},
        "checkpointing": {"checkpoint": True},
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "whole after the forward pass": {"reshard_after_forward": False},
        "hybrid": {"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))},
    }
    found = {}
    reference = anchor_gradients(uneven_llama())
    for way, options in ways.items():
        how = {name: options.pop(name) for name in ("accumulate", "evaluate", "checkpoint") if name in options}
        undisturbed, _ = trained(sharded_llama(**options), look=False, **how)
        weights, seen = trained(sharded_llama(**options), look=True, **how)
        found[way] = {
            "names": list(seen[0]) == list(reference),
            "error": max(float((seen[0][name] - one).norm() / one.norm()) for name, one in reference.items()),
            "undisturbed": all(torch.equal(weights[name], one) for name, one in undisturbed.items()),
        }
    model = sharded_llama()
    full = whole(model)
    found["rows"] = {
        name: (local_rows(one).start, local_rows(one).stop, torch.equal(full[name][local_rows(one)], one.to_local()))
        for name, one in model.named_parameters()
    }
    found["group"] = dist.get_process_group_ranks(process_group(model.lm_head.weight))
    found["after an error"] = after_an_error()
    return found | {"refused": refusals()}


def after_an_error():
    """An error inside the block, between two modules of a group; then training as if nothing had been."""
    model = sharded_llama()

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(stop)
    try:
        looked_at(model)
    except KeyboardInterrupt:
        handle.remove()
    weights, _ = trained(model, look=False)
    undisturbed, _ = trained(sharded_llama(), look=False)
    return all(torch.equal(weights[name], one) for name, one in undisturbed.items())


def refusals():
    """Return what is said to models that cannot be supported."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    busy = sharded_llama()
    busy.model.layers[1].register_forward_hook(lambda *_: enter(busy))
    flat = FullyShardedDataParallel(uneven_llama(), use_orig_params=True, device_id=torch.device("cpu"))
    by_columns = tiny_llama()
    fully_shard(by_columns, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    parallel = tiny_llama()
    for layer in parallel.model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (2,)), plan)
    return {
        "busy": said(lambda: loss(busy, 0)),
        "FSDP1": said(lambda: enter(flat)),
        "tensor parallel": said(lambda: enter(parallel)),
        "tensor parallel rows": said(lambda: process_group(parallel.model.layers[0].mlp.down_proj.weight)),
        "columns": said(lambda: local_rows(by_columns.lm_head.weight)),
        "not sharded": said(lambda: local_rows(nn.Parameter(torch.ones(2)))),
    }


def enter(model):
    with gathered(model):
        pass


def said(action):
    try:
        action()
    except SPFError as error:
        return str(error)
    return None


# ----------------------------------------------------------------------------------------------------- deepspeed


def deepspeed():
    """Return what is said to DeepSpeed, whichever of its parts SPF is attached to."""
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin

    deepspeed.ops.__compatible_ops__.clear()  # or it compiles one, for a minute
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    plugin = DeepSpeedPlugin(hf_ds_config=settings | {"zero_allow_untested_optimizer": True})
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = uneven_llama()
    early = torch.optim.AdamW(model.parameters(), lr=1e-2)
    spf = SPF(SAFETY, rule="mixed-left", tokenizer=TOKENIZER)
    guard = spf.attach(model, early)
    engine, optimizer = accelerator.prepare(model, early)
    found = {
        "prepared": said(lambda: spf.attach(accelerator.unwrap_model(engine), optimizer)),
        "engine": said(lambda: spf.attach(engine, optimizer)),
        "its own optimizer": said(lambda: spf.attach(model, engine.optimizer)),
    }
    tokens = torch.tensor([ROWS[0]])

    def step():  # accelerate has DeepSpeed step here
        accelerator.backward(engine(input_ids=tokens, labels=tokens).loss)

    found["attached before"] = said(step)
    found["kind"], found["steps"] = str(accelerator.distributed_type), guard.certificate.steps
    return found


def own_loop():
    """Train processes that are not alike in a loop that adds the safety gradient after the backward pass."""
    model = uneven_llama()
    off_by_rounding(model)
    wrapped, optimizer = nn.parallel.DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.05)
    with SPF(SAFETY, mix=2, largest_mix=50, tokenizer=TOKENIZER).attach(model, optimizer) as guard:
        for step in range(4):
            optimizer.zero_grad()
            loss(wrapped, step).backward()
            optimizer.step()
    return {"weights": whole(model), "drift": max(record.anchor_loss for record in guard.certificate.records)}


# ---------------------------------------------------------------------------------------------------------- main


def runs(folder, **engine):
    """Train with each rule, and once where the processes are not alike."""
    found = {str(rule): train(rule, folder, ddp_backend="gloo", **engine) for rule in RULES}
    return found | {"unlike": train("rank1", folder, prepare=off_by_rounding, ddp_backend="gloo", **engine)}


def run(mode, folder):
    """Do what a mode asks for."""
    if mode == "deepspeed":
        return deepspeed()
    if mode == "ddp":
        return runs(folder) | {"own loop": own_loop()}
    with fsdp_on_cpu():
        found = runs(folder, **FSDP2)
    return found | {"sharding": sharding()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = run(sys.argv[1], sys.argv[2])
    torch.save(found, Path(sys.argv[2]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
