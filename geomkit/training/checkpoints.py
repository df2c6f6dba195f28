"""Checkpoints of a fine-tune that is interrupted: which are complete, and whether they are of this very run."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from geomkit.errors import DataError
from geomkit.utils.files import write_atomically

MARK = "geomkit.json"
"""In the folder: whose it is, with the settings. In a checkpoint, written last: that it is complete."""

LOG = "spf.jsonl"
"""The certificate of the run, beside the checkpoints."""

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class MarkComplete(TrainerCallback):
    """Marks every checkpoint when all of it is written; must be the last callback."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the mark."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_atomically(folder / MARK, "{}")


def begin_or_resume(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """Make a folder a run's own, or find the checkpoint that the run goes on from.

    Checkpoints that were being written when the run ended are removed, and where there is no other, its certificate.

    Args:
        folder: Where the checkpoints are or will be.
        settings: What the run depends on.

    Returns:
        The last complete checkpoint; ``None`` if there is none.

    Raises:
        DataError: If the folder holds something else, or a run with other settings.
    """
    wanted = json.loads(json.dumps(settings, default=str))
    mark = folder / MARK
    if not mark.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(
                f"expected a new or empty folder for checkpoints at {folder}, or one of this run, found something else "
                "there; choose another"
            )
        write_atomically(mark, json.dumps(wanted))
        return None
    saved = json.loads(mark.read_text(encoding="utf-8"))
    if different := sorted(name for name in {*saved, *wanted} if saved.get(name) != wanted.get(name)):
        name = different[0]
        raise DataError(
            f"expected the run of {folder} to go on with {name}={saved.get(name)!r}, found {wanted.get(name)!r}; give "
            "the same settings, or another folder"
        )
    steps = {int(found[1]): path for path in folder.iterdir() if (found := _CHECKPOINT.fullmatch(path.name))}
    complete = {step: path for step, path in steps.items() if (path / MARK).is_file()}
    for path in set(steps.values()) - set(complete.values()):
        shutil.rmtree(path)
    if complete:
        return complete[max(complete)]
    if wanted.get("log"):
        Path(wanted["log"]).unlink(missing_ok=True)  # of steps that nothing remains of
    return None


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights, from the sum and the sum of squares of each."""
    sums = [
        (name, tuple(one.shape), float(one.detach().double().sum()), float(one.detach().double().square().sum()))
        for name, one in model.named_parameters()
    ]
    return hashlib.sha256(repr(sums).encode()).hexdigest()
