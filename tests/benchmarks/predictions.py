"""What ``describe(…, predict=True)`` predicts of time and memory, beside what is measured.

    python -m tests.benchmarks.predictions                                             # the organism, minutes
    python -m tests.benchmarks.predictions --models FOLDER --examples 8                # a real model
    python -m tests.benchmarks.predictions --models llama-1b --examples 4              # 1.24B in bf16, 14 GiB
    python -m tests.benchmarks.predictions --models d576 d2048 --tasks step "step under SPF"

Every task has a process of its own, and so have the predictions of a model. Time is CPU time of one thread:
of a collection and an analysis as a whole, of a fine-tune the median of the steps after the first. Memory is the
process's peak beyond what it held before the model was there. A busy machine is slow by turns: the ratio of the times
is that of the predicted and the measured multiple of a pass over 48 tokens, which each process times before and after.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

import geomkit as gk
from geomkit.planning.speed import measure_speed
from tests.benchmarks.memory import resident
from tests.benchmarks.resumable import Cell, measured_cells
from tests.benchmarks.shapes import SHAPES, random_llama

_STEPS = 3
_TASKS = ("collection", "analysis", "step", "step under SPF", "step of LoRA", "step of LoRA under SPF")

_LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
"""The shape of Llama 3.2 1B."""


def _loaded(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = gk.load_organism()[1]
    if name in SHAPES:
        return random_llama(SHAPES[name]), tokenizer
    if name != "llama-1b":
        return gk.load_organism() if name == "organism" else gk.load_model(name)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**_LLAMA_1B, **ids)).eval(), tokenizer
    finally:
        torch.set_default_dtype(torch.float32)


def _with_lora(model: PreTrainedModel) -> PreTrainedModel:
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def _sets(examples: int) -> tuple[gk.Probe, Dataset]:
    """Return the probe of an analysis of three sets of like lengths, and the second set, for the other tasks."""
    probe = gk.Probe(gk.load_examples("safety"), gk.load_examples("utility"), examples=examples)
    rows = concatenate_datasets([rows.select_columns(["messages"]) for rows in probe.drawn_sets()])
    lengths = [sum(len(turn["content"]) for turn in messages) for messages in rows["messages"]]
    ascending = sorted(range(len(rows)), key=lengths.__getitem__)
    first, second, third = (rows.select(ascending[start::3]) for start in range(3))
    return gk.Probe(first, second, third, examples=None), second


def _unit(model: PreTrainedModel) -> float:
    """Return the seconds of a forward and backward pass over 48 tokens."""
    ids = torch.arange(48).reshape(2, 24)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    times = []
    for _ in range(3):
        start = time.process_time()
        torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights, allow_unused=True)
        times.append(time.process_time() - start)
    return median(times)


class _Clock(TrainerCallback):
    """CPU time at the beginning of every step and at the end of the last one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.process_time())

    on_train_end = on_step_begin

    @property
    def seconds(self) -> float:
        return median(after - before for before, after in zip(self.times[1:], self.times[2:], strict=False))


def _steps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, spf: gk.SPF | None) -> float:
    clock = _Clock()
    gk.finetune(model, tokenizer, rows, spf, steps=_STEPS, callbacks=[clock], learning_rate=1e-5, progress=False)
    return clock.seconds


def measured(name: str, task: str, examples: int) -> dict[str, float]:
    """Do a task in this process, and return its seconds and its peak in bytes."""
    small = gk.Probe(gk.load_examples("safety"), gk.load_examples("utility"), examples=4, layers=[0])
    small.analyze(*gk.load_organism())
    before = resident("VmRSS")
    model, tokenizer = _loaded(name)
    probe, rows = _sets(examples)
    if "LoRA" in task:
        model = _with_lora(model)
    unit = _unit(model)
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    seconds = None
    if task == "collection":
        gk.collect_gradients(model, tokenizer, rows, progress=False)
    elif task == "analysis":
        probe.analyze(model, tokenizer)
    else:
        seconds = _steps(model, tokenizer, rows, gk.SPF(rows) if "SPF" in task else None)
    total = time.process_time() - start
    peak = resident("VmHWM") - before
    return {"seconds": total if seconds is None else seconds, "peak": peak, "unit": (unit + _unit(model)) / 2}


def predicted(name: str, task: str, examples: int) -> dict[str, dict[str, float]]:
    """Return what is predicted of a task and of its kin, from the speed that is measured in this process."""
    model, tokenizer = _loaded(name)
    _, rows = _sets(examples)
    if "LoRA" in task:
        model = _with_lora(model)
    unit = _unit(model)
    start = time.process_time()
    speed = measure_speed(model, clock=time.process_time)
    predictions = gk.describe(model, tokenizer, rows, predict=speed, progress=False).predictions
    took = time.process_time() - start
    unit = (unit + _unit(model)) / 2
    kin = [other for other in _TASKS if other in {"collection", "analysis"} or ("LoRA" in other) == ("LoRA" in task)]
    return {
        task: {"seconds": found.seconds or 0.0, "peak": found.peak, "unit": unit, "took": took}
        for task, found in zip(kin, predictions, strict=True)
    }


def _in_own_process(kind: str, model: str, task: str, examples: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.predictions", "--one", kind, "--models", model]
    command += ["--tasks", task, "--examples", str(examples)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return dict(json.loads(done.stdout.splitlines()[-1]))


@cache
def _predicted(model: str, lora: bool, examples: int) -> dict[str, Any]:
    return _in_own_process("predicted", model, _TASKS[-1] if lora else _TASKS[0], examples)


def _cell(cell: Cell) -> Cell:
    model, task, examples = cell["model"], cell["task"], cell["examples"]
    guess = _predicted(model, "LoRA" in task, examples)[task]
    return {"predicted": guess, "measured": _in_own_process("measured", model, task, examples)}


def _wanted(options: argparse.Namespace) -> Iterator[Cell]:
    for model in options.models:
        for task in options.tasks:
            yield {"model": model, "task": task, "examples": options.examples}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["organism"], help="organism, llama-1b, a name in shapes, or a folder"
    )
    parser.add_argument("--tasks", nargs="+", choices=_TASKS, default=_TASKS)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--out", type=Path, help="file with a cell a line; its cells are not run again")
    parser.add_argument("--one", choices=("predicted", "measured"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        run: Callable[..., dict[str, Any]] = predicted if options.one == "predicted" else measured
        sys.stdout.write(f"{json.dumps(run(options.models[0], options.tasks[0], options.examples))}\n")
        return
    columns = ("predicted, s", "measured, s", "ratio", "predicted, GiB", "measured, GiB", "ratio", "describe, s")
    table = Table("model", "task", *columns)
    for cell in measured_cells(_wanted(options), _cell, options.out):
        guess, truth = cell["predicted"], cell["measured"]
        times, peaks = ([guess[key], truth[key]] for key in ("seconds", "peak"))
        ratio = times[0] / guess["unit"] * truth["unit"] / times[1]
        table.add_row(
            Path(cell["model"]).name, cell["task"], *(f"{value:.2f}" for value in (*times, ratio)),
            *(f"{size / 2**30:.2f}" for size in peaks), f"{peaks[0] / peaks[1]:.2f}", f"{guess['took']:.1f}",
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
