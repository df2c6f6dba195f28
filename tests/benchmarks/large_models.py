"""What ``describe`` predicts that large models need, as the README of ``collection`` has it.

    python -m tests.benchmarks.large_models                    # a quarter of an hour on one CPU thread, 12 GiB
    python -m tests.benchmarks.large_models --device cuda

Llama 3 in bf16 on the meta device, examples of 50 tokens, half of them scored. The speed of passes is that of a model
of 1B with random weights on this device; what a pass needs beyond its operations grows with the weights. The unit of
time is a forward and backward pass with weight gradients over the tokens of the task.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from geomkit.collection.memory import Counts
from geomkit.collection.streaming import TOKENS_PER_BATCH
from geomkit.inputs.tokens import Tokens
from geomkit.planning.prediction import Pace, Prediction, analysed, drawn_anchors, predict_tasks
from geomkit.planning.rehearsal import rehearse
from geomkit.planning.simulation import simulate
from geomkit.planning.speed import PassSpeed, Speed, measure_speed

SIZES: dict[str, dict[str, int | bool]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""Shapes of Llama 3.2 1B and 3B and of Llama 3.1 8B."""

_LENGTH, _EXAMPLES = 50, 64


def llama(size: str, device: str) -> PreTrainedModel:
    """Return a model of a size in bf16, on the meta device or with random weights."""
    config = LlamaConfig(vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=size != "8B", **SIZES[size])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def counts() -> Counts:
    """Return the counts of examples of random tokens."""
    generator = torch.Generator().manual_seed(0)
    mask = tuple(place >= _LENGTH // 2 for place in range(_LENGTH))
    rows = torch.randint(128_256, (_EXAMPLES, _LENGTH), generator=generator).tolist()
    return Counts.of(Tokens(tuple(row), mask) for row in rows)


def scaled(speed: Speed, factor: float) -> Speed:
    """Return the speed of passes of a model with so many times as many weights."""

    def grown(passes: PassSpeed) -> PassSpeed:
        return PassSpeed(passes.rate, factor * passes.overhead)

    return replace(
        speed,
        training=grown(speed.training),
        collecting=grown(speed.collecting),
        answering=grown(speed.answering),
    )


def predicted(model: PreTrainedModel, speed: Speed, examples: Counts, progress: bool) -> list[Prediction]:
    """Return what is predicted of a model."""
    rehearsal = rehearse(model, analysed(examples), drawn_anchors(examples), speed, progress=progress)
    return predict_tasks(model, examples, TOKENS_PER_BATCH, Pace(speed, rehearsal))


def _rows(model: PreTrainedModel, speed: Speed, progress: bool) -> Iterator[tuple[str, str]]:
    """Yield each task with its memory, its seconds and its time in passes over its own tokens."""
    full = simulate(model, 16, _LENGTH, weight_gradients=True).operations
    plain = predicted(model, speed, counts(), progress)
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    lora = predicted(adapted, speed, counts(), progress)[2:]
    for prediction, tokens in zip([*plain, *lora], (_EXAMPLES, 96, 16, 16, 16, 16), strict=True):
        assert prediction.seconds is not None
        # As many passes as there are batches.
        passes = speed.training.seconds(full * tokens / 16, max(1, tokens * _LENGTH / TOKENS_PER_BATCH))
        said = f"{prediction.peak / 2**30:.0f} GiB, {prediction.seconds:.0f} s, {prediction.seconds / passes:.1f}"
        yield prediction.task, said


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    small = llama("1B", options.device)
    weights = sum(parameter.numel() for parameter in small.parameters())
    speed = measure_speed(small, clock=clock, progress=True)
    del small
    console = Console(width=160)
    console.print(speed)
    table = Table("task", *options.sizes, title="memory at the peak, time, time / a pass over the same tokens")
    columns = {}
    for size in options.sizes:
        model = llama(size, "meta")
        factor = sum(parameter.numel() for parameter in model.parameters()) / weights
        columns[size] = list(_rows(model, scaled(speed, factor), progress=True))
        console.print(size, columns[size])
    for rows in zip(*columns.values(), strict=True):
        table.add_row(rows[0][0], *(said for _, said in rows))
    console.print(table)


if __name__ == "__main__":
    main()
