"""The cost of an analysis, as a ratio to the collection of the gradients that it analyses, and its peak memory.

    python -m tests.benchmarks.analysis                                  # the organism and six layers of width 576
    python -m tests.benchmarks.analysis --checkpoint FOLDER --examples 8 # also a real model

Every model has two processes of its own, for the times and for the memory; a small analysis runs in each before.
Time is CPU time of one thread; the answers to the safety requests are not included. Memory is the peak beyond what the
process held before the model was loaded, beside the bound: the model and twice the factors of the examples' gradients.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import geomkit as gk
from geomkit.gradients.gradient_set import GradientSet
from tests.benchmarks.memory import resident

_WIDE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""Six layers of the width of SmolLM2-135M, whose embedding is its head."""


@dataclass(frozen=True)
class Cost:
    """What collecting and analysing took.

    Attributes:
        tokens: Number of tokens of the examples of all sets.
        collection: CPU seconds of the collection.
        analysis: CPU seconds of the measurements on the gradients.
        model: Bytes of the model's weights.
        factors: Bytes of the examples' gradients.
        collected: Peak bytes of the collection, with the model.
        peak: Peak bytes of the measurements, with the model.
    """

    tokens: int
    collection: float
    analysis: float
    model: int
    factors: int
    collected: int
    peak: int

    @property
    def ratio(self) -> float:
        """Collection and measurements together, over the collection."""
        return 1 + self.analysis / self.collection


def _wide(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return LlamaForCausalLM(LlamaConfig(**_WIDE, **ids)).eval()


def _twice(rows: Dataset) -> Dataset:
    """The same conversations with every message said twice: as many tokens as usual prompts have."""
    return rows.map(
        lambda row: {
            "messages": [{**message, "content": " ".join([message["content"]] * 2)} for message in row["messages"]]
        }
    )


def _loaded(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset, Dataset]:
    safety, utility = gk.load_examples("safety"), gk.load_examples("utility")
    if name == "width 576":
        tokenizer = gk.load_organism()[1]
        return _wide(tokenizer), tokenizer, _twice(safety), _twice(utility)
    model, tokenizer = gk.load_organism() if name == "organism" else gk.load_model(name)
    return model, tokenizer, safety, utility


def _bytes(sets: list[GradientSet]) -> int:
    """Bytes of the gradients of all examples; parameters with the same inputs share these."""
    tensors = (t for found in sets for sample in found.samples for part in sample.values() for t in part.tensors)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def cost(name: str, examples: int) -> Cost:
    """Measure one model, in this process."""
    small = {"examples": 4, "layers": [0]}
    organism = gk.load_organism()
    gk.Probe(gk.load_examples("safety"), gk.load_examples("utility"), **small).analyze(*organism)
    before = resident("VmRSS")
    model, tokenizer, safety, utility = _loaded(name)
    probe = gk.Probe(safety, utility, examples=examples)
    _reset_peak()
    start = time.process_time()
    sets = list(probe.collect_samples(model, tokenizer))
    collection = time.process_time() - start
    collected = resident("VmHWM") - before
    _reset_peak()
    start = time.process_time()
    probe.measure(*sets)
    analysis = time.process_time() - start
    return Cost(
        tokens=sum(len(row) for rows in probe.drawn_sets() for row in gk.encode(tokenizer, rows)),
        collection=collection,
        analysis=analysis,
        model=sum(parameter.nbytes for parameter in model.parameters()),
        factors=_bytes(sets),
        collected=collected,
        peak=resident("VmHWM") - before,
    )


def _in_own_process(name: str, examples: int, settings: dict[str, str]) -> Cost:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | settings
    command = [sys.executable, "-m", "tests.benchmarks.analysis", "--one", name, "--examples", str(examples)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--models", nargs="*", default=["organism", "width 576"])
    parser.add_argument("--checkpoint", action="append", default=[], help="Folder or hub id of a further model.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        sys.stdout.write(f"{json.dumps(asdict(cost(options.one, options.examples)))}\n")
        return
    titles = ("tokens", "collection, CPU s", "analyze / collection", "model, MB", "factors, MB", "peak: collect, MB")
    table = Table("model", *titles, "peak: measure, MB", "model + 2 × factors, MB")
    for name in (*options.models, *options.checkpoint):
        timed = _in_own_process(name, options.examples, {})
        # A freed block leaves the resident set at once only if it was mapped on its own, which takes time.
        found = _in_own_process(name, options.examples, {"MALLOC_MMAP_THRESHOLD_": "65536"})
        sizes = (found.model, found.factors, found.collected, found.peak, found.model + 2 * found.factors)
        megabytes = (f"{size / 2**20:,.0f}" for size in sizes)
        table.add_row(name, str(found.tokens), f"{timed.collection:.1f}", f"{timed.ratio:.2f}", *megabytes)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
