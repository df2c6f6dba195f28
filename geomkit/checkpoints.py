"""Checkpoints of a fine-tune that is interrupted: which are complete, and whether they are of this very run."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from geomkit._files import write_atomically
from geomkit.errors import DataError

_MARK = "geomkit.json"
"""Written last into a checkpoint, and in one step: where it is, the checkpoint is complete."""

LOG = "spf.jsonl"
"""The certificate of the run, beside the checkpoints."""


class MarkComplete(TrainerCallback):
    """Marks every checkpoint when all of it is written; must be the last callback.

    Args:
        settings: What the run depends on.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        """Keep the settings."""
        self._settings = settings

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the mark."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_atomically(folder / _MARK, json.dumps(self._settings))


def last_complete(folder: Path, settings: dict[str, Any]) -> Path | None:
    """Return the last complete checkpoint, and remove those that were being written when their run ended.

    Args:
        folder: Where the checkpoints are, if there are any.
        settings: What the run depends on.

    Returns:
        The checkpoint; ``None`` if there is none.

    Raises:
        DataError: If it is of a run with other settings.
    """
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in found if (path / _MARK).is_file()]
    for path in set(found) - set(complete):
        shutil.rmtree(path)
    if not complete:
        (folder / LOG).unlink(missing_ok=True)  # of steps that nothing remains of
        return None
    saved = json.loads((complete[-1] / _MARK).read_text(encoding="utf-8"))
    if different := sorted(name for name in {*saved, *settings} if saved.get(name) != settings.get(name)):
        name = different[0]
        raise DataError(
            f"expected the run of {folder} to go on with {name}={saved.get(name)!r}, found {settings.get(name)!r}; "
            "give the same settings, or another folder"
        )
    return complete[-1]
