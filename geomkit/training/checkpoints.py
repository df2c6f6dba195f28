"""Checkpoints of a fine-tune that may be interrupted: whether they belong to this run, and which are complete."""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from geomkit.errors import DataError
from geomkit.utils.arguments import as_python
from geomkit.utils.files import locked, parse_json, write_atomically
from geomkit.version import __version__

MARK = "geomkit.json"
"""In the run's folder, a file with the run's settings; in a checkpoint, a list of its files, written last of all."""

_LOGGER = logging.getLogger(__name__)

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
    """Marks every sound checkpoint after all its files are written; must be the last callback."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the mark, a list of the files with their sizes, unless a weight is not finite; the first process does.

        A run is never resumed from a checkpoint without mark: from weights that are NaN it could not go on.
        """
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if broken := _broken_weight(kwargs["model"]):
            _LOGGER.warning("%s: '%s' is not finite; this checkpoint is not marked complete", folder, broken)
            return
        write_atomically(folder / MARK, json.dumps({"files": _sizes(folder)}))


def _broken_weight(model: nn.Module) -> str | None:
    """Return the name of a weight with a value that is not finite."""
    broken = (name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all()))
    return next(broken, None)


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file of a checkpoint but the mark, and drafts of other processes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith((MARK, ".")))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Hold the folder of a run inside the block: no other run may write to it.

    A new folder that stays empty is removed.

    Args:
        folder: The folder for checkpoints, which need not exist.

    Raises:
        DataError: If another run is writing to the folder, or it cannot be made.
    """
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(folder, error) from None
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise DataError(
                f"expected a folder for checkpoints that no other run is writing to, found {folder} in use; wait for "
                "that run to end, or choose another folder"
            ) from None
        except OSError as error:
            raise _no_folder(folder, error) from None
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):  # it holds files
                    folder.rmdir()


def _no_folder(folder: Path, error: OSError) -> DataError:
    return DataError(f"expected a folder for checkpoints at {folder}, found {error.strerror}; choose another")


def last_checkpoint(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint from which a run is resumed, after a check that the folder is free or belongs to this run.

    Checkpoints without mark, which were being written when the run ended, are removed. Marked checkpoints that lack a
    file, or have a file of another size, are kept as ``damaged-checkpoint-…`` and not resumed. If no complete
    checkpoint is left, the run's certificate is removed.

    Args:
        folder: The folder for checkpoints, which need not exist.
        settings: The settings that the run depends on.

    Returns:
        The last complete checkpoint; ``None`` if there is none.

    Raises:
        DataError: If the folder holds other files, a run of another version of geomkit, or a run with other settings,
            or the file with the settings is damaged.
    """
    mark = folder / MARK
    if not mark.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(
                f"expected a new or empty folder for checkpoints at {folder}, or one of this run, found something else "
                "there; choose another"
            )
        return None
    saved = _read_mark(mark)
    if not saved:
        raise DataError(f"expected the settings of a run in {mark}, found a damaged file; choose another folder")
    _check_same_run(folder, saved, _as_saved(settings))
    numbers = {path: int(match[1]) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    marked = {path for path in numbers if (path / MARK).is_file()}
    for path in set(numbers) - marked:
        shutil.rmtree(path)
    for path in sorted(marked, key=numbers.__getitem__, reverse=True):
        damage = _damage(path)
        if damage is None:
            return path
        aside = _free_name(path.with_name(f"damaged-{path.name}"))
        path.rename(aside)
        _LOGGER.warning("%s: %s; it is kept as %s, and the run goes on from the one before", path, damage, aside.name)
    if log := settings.get("log"):
        Path(log).unlink(missing_ok=True)  # its steps are lost with the checkpoints
    return None


def _read_mark(path: Path) -> dict[str, Any]:
    """Return the content of a mark; an empty dictionary if it is damaged or no object of JSON."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a marked checkpoint: a file that is missing, or of another size than at its writing."""
    files = _read_mark(checkpoint / MARK).get("files")
    if not isinstance(files, dict):
        return f"expected a list of files in {MARK}, found none"
    present = _sizes(checkpoint)
    for name, size in files.items():
        if present.get(name) != size:
            return f"expected {name} of {size} bytes, found {present.get(name, 'none')}"
    return None


def _free_name(path: Path) -> Path:
    """Return the path, or one with a number where something is there already."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 1000))
    return path if not path.exists() else next(candidate for candidate in numbered if not candidate.exists())


def _json_value(value: Any) -> Any:
    number = as_python(value)
    return str(value) if number is value else number


def _as_saved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings, with geomkit's version, as they come back from a JSON file."""
    saved: dict[str, Any] = json.loads(json.dumps({_VERSION: __version__, **settings}, default=_json_value))
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
