"""Checkpoints of a fine-tune that may be interrupted: whether they belong to this run, and which are complete."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from geomkit.errors import DataError
from geomkit.utils.files import write_atomically
from geomkit.version import __version__

MARK = "geomkit.json"
"""In the run's folder, a file with the run's settings; in a checkpoint, a file that is written last of all."""

LOG = "spf.jsonl"
"""The certificate of the run, in the run's folder."""

_VERSION = "geomkit"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class MarkBegun(TrainerCallback):
    """Notes that the training has begun, and writes the run's settings to its folder; must be the first callback.

    A run that ends before the training, because transformers refuses an argument, does not mark the folder as its own.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        """Keep the folder for checkpoints, ``None`` without one, and the settings that the run depends on."""
        self._folder, self._settings = folder, settings
        self.begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the settings, unless the run is resumed."""
        self.begun = True
        if self._folder is not None and not (self._folder / MARK).is_file():
            write_atomically(self._folder / MARK, json.dumps(_as_saved(self._settings)))


class MarkComplete(TrainerCallback):
    """Marks every checkpoint after all its files are written; must be the last callback."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the mark."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_atomically(folder / MARK, "{}")


def last_checkpoint(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint from which a run is resumed, after a check that the folder is free or belongs to this run.

    Incomplete checkpoints, which were being written when the run ended, are removed. If no complete checkpoint is left,
    the run's certificate is removed too.

    Args:
        folder: The folder for checkpoints, which need not exist.
        settings: The settings that the run depends on.

    Returns:
        The last complete checkpoint; ``None`` if there is none.

    Raises:
        DataError: If the folder holds other files, a run of another version of geomkit, or a run with other settings.
    """
    mark = folder / MARK
    if not mark.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(
                f"expected a new or empty folder for checkpoints at {folder}, or one of this run, found something else "
                "there; choose another"
            )
        return None
    _check_same_run(folder, json.loads(mark.read_text(encoding="utf-8")), _as_saved(settings))
    numbers = {path: match for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    complete = {int(match[1]): path for path, match in numbers.items() if (path / MARK).is_file()}
    for path in set(numbers) - set(complete.values()):
        shutil.rmtree(path)
    if complete:
        return complete[max(complete)]
    if log := settings.get("log"):
        Path(log).unlink(missing_ok=True)  # its steps are lost with the checkpoints
    return None


def _as_saved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings, with geomkit's version, as they come back from a JSON file."""
    saved: dict[str, Any] = json.loads(json.dumps({_VERSION: __version__, **settings}, default=str))
    return saved


def _check_same_run(folder: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a run whose version or settings differ from the saved ones in its folder; the version comes first.

    Raises:
        DataError: If the versions or the settings differ.
    """
    if saved.get(_VERSION) != settings[_VERSION]:
        begun_by = f"version {saved[_VERSION]}" if _VERSION in saved else "an earlier version"
        raise DataError(
            f"expected the run of {folder} to be begun by version {settings[_VERSION]} of geomkit, found {begun_by}; "
            "finish it with that version, or choose another folder"
        )
    if different := sorted(name for name in {*saved, *settings} if saved.get(name) != settings.get(name)):
        name = different[0]
        raise DataError(
            f"expected the run of {folder} to go on with {name}={saved.get(name)!r}, found {settings.get(name)!r}; "
            "give the same settings, or another folder"
        )
