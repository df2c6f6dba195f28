"""What a screen costs, as a ratio to one plain forward and backward over the same rows in the same batches.

python -m tests.benchmarks.screening    # the organism, 25M parameters, SmolLM2's width; one CPU thread, minutes
"""

from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import nn

import geomkit as gk
from geomkit.inputs.batches import collate, plan_batches
from geomkit.inputs.loss import example_losses, token_losses
from geomkit.inputs.tokens import Tokens, lengths_of
from geomkit.screening.reference import safety_reference
from geomkit.screening.row_scores import score_rows
from tests.benchmarks.contender import Piece
from tests.benchmarks.shapes import SHAPES, random_llama, random_tokens
from tests.benchmarks.timing import interleaved

TOKENS = 4096


def plain(model: nn.Module, rows: Sequence[Tokens]) -> None:
    """One forward and backward pass over the rows, with the gradient of every weight."""
    for plan in plan_batches(lengths_of(rows), TOKENS):
        batch = collate([rows[index] for index in plan], 0, examples=plan)
        model.zero_grad(set_to_none=True)
        example_losses(token_losses(model, batch), batch).sum().backward()
    model.zero_grad(set_to_none=True)


def rows_of(name: str) -> tuple[nn.Module, list[Tokens], list[Tokens]]:
    """Return a model, its training rows and its safety rows."""
    if name == "organism":
        model, tokenizer = gk.load_organism()
        sets = (gk.load_examples(source) for source in ("scenarios/poison-10", "safety"))
        train, safety = (list(gk.encode(tokenizer, rows)) for rows in sets)
        return model, train, safety
    size, _, lengths = name.partition(", ")
    count, _, tokens = lengths.partition(" × ")
    shape = SHAPES[size]
    drawn = random_tokens(shape, int(count) + 4, int(tokens)).tolist()
    # The first half of each row is the request, on which no loss is taken.
    scored = tuple(place >= int(tokens) // 2 for place in range(int(tokens)))
    rows = [Tokens(tuple(row), scored) for row in drawn]
    return random_llama(shape, "cpu", torch.float32), rows[4:], rows[:4]


def main() -> None:
    torch.set_num_threads(1)
    table = Table("model, rows × tokens", "cosine and raw", "with adam", title="a screen over one forward and backward")
    with threadpool_limits(1):
        for name in ("organism", "25m, 16 × 128", "25m, 4 × 500", "d576, 16 × 50"):
            model, train, safety = rows_of(name)
            pieces = {}
            for preconditioned in (False, True):
                reference = safety_reference(
                    model, safety, train, 0, preconditioned=preconditioned, tokens_per_batch=TOKENS, seed=0
                )
                screen = partial(score_rows, model, train, 0, reference, tokens_per_batch=TOKENS, title="")
                pieces["with adam" if preconditioned else "cosine"] = [Piece(screen)]
            _, ratios = interleaved(partial(plain, model, train), pieces, rounds=3, device=torch.device("cpu"))
            table.add_row(name, str(ratios["cosine"]), str(ratios["with adam"]))
            Console(stderr=True).print(name, str(ratios["cosine"]), str(ratios["with adam"]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
