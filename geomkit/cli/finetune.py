"""The command ``geomkit finetune``: a fine-tune, under SPF where anchors are given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from geomkit.cli.inputs import load_and_encode, read_sets
from geomkit.cli.options import (
    ColumnsOption,
    Device,
    Mask,
    MaxLength,
    ModelOption,
    PadToken,
    Seed,
    Threads,
    TrainingDtype,
    number,
)
from geomkit.cli.outputs import check_writable
from geomkit.cli.start import prepare
from geomkit.errors import DataError
from geomkit.utils.terminal import say

_INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def finetune(
    model: ModelOption,
    train: Annotated[str, typer.Option(help="Conversations: file, hub id or shipped set.")],
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.", file_okay=False)],
    anchors: Annotated[str | None, typer.Option(help="Safety examples; SPF is used when given.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="adaptive-kl-left (default), mixed-left, rank1, left, …: geomkit/spf/README.md has all."),
    ] = None,
    rank: Annotated[int | None, number("Rank of a rule that removes a subspace.")] = None,
    anchors_per_step: Annotated[int | None, number("Anchors drawn for each step; 8 when left out.")] = None,
    benign: Annotated[str | None, typer.Option(help="Benign requests with answers that are to be kept.")] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints; an interrupted run resumes there.", file_okay=False),
    ] = None,
    save_steps: Annotated[int, number("Steps between checkpoints.")] = 100,
    learning_rate: Annotated[float, number("Peak learning rate.")] = 2e-5,
    epochs: Annotated[float, number("Passes over the data.")] = 3,
    steps: Annotated[int | None, number("Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, number("Examples per step.")] = 16,
    max_length: MaxLength = None,
    assistant_mask: Mask = "auto",
    pad_token: PadToken = None,
    columns: ColumnsOption = None,
    dtype: TrainingDtype = "float32",
    device: Device = None,
    lora: Annotated[int | None, number("Train LoRA adapters of this rank, not the weights.")] = None,
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Fine-tune a model, under SPF where anchors are given, and write a checkpoint."""
    prepare(threads)
    from geomkit.inputs.models import require_peft, with_lora
    from geomkit.spf.rules import DEFAULT_RULE, get_rule
    from geomkit.spf.settings import SPF
    from geomkit.training.checkpoints import MARK
    from geomkit.training.finetune import finetune as run_finetune
    from geomkit.training.result import new_or_empty_folder

    check_writable(out, checkpoints)
    new_or_empty_folder(out)
    if anchors is None:
        _refuse_options_of_spf({"rule": rule, "rank": rank, "anchors-per-step": anchors_per_step, "benign": benign})
    if lora is not None:
        require_peft("--lora")
    if checkpoints is not None and out.resolve() in (checkpoints.resolve(), *checkpoints.resolve().parents):
        raise DataError(f"expected --checkpoints outside of --out {out}, found {checkpoints}; choose another folder")
    spf_rule = get_rule(rule or DEFAULT_RULE, rank)
    conversations, *protected = read_sets([name for name in (train, anchors, benign) if name], columns)
    spf = None
    if anchors is not None:
        fence = protected[1] if benign else None
        spf = SPF(protected[0], rule=spf_rule, anchors_per_step=anchors_per_step or 8, benign=fence, seed=seed)
    loaded, tokenizer, [rows] = load_and_encode(
        model, [conversations], assistant_mask, max_length, pad_token, dtype, device
    )
    result = run_finetune(
        loaded if lora is None else with_lora(loaded, lora, seed=seed),
        tokenizer,
        rows,
        spf,
        learning_rate=learning_rate,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        inplace=True,
        checkpoints=checkpoints,
        save_steps=save_steps,
    )
    say(f"{result}.")
    if result.interrupted and checkpoints is not None:
        any_kept = any(checkpoints.glob(f"checkpoint-*/{MARK}"))
        say(f"The same command {'goes on from the last checkpoint' if any_kept else 'begins anew: no checkpoint yet'}.")
    else:
        typer.echo(f"wrote {result.save(out, tokenizer)}")
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)


def _refuse_options_of_spf(given: Mapping[str, object]) -> None:
    """Refuse options that only SPF has, where there are no anchors for it.

    Raises:
        DataError: If one of them has a value.
    """
    for name, value in given.items():
        if value is not None:
            raise DataError(f"expected anchors for --{name} {value}, found none; give --anchors (shipped: safety)")
