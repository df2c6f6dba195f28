"""The result of a fine-tune: the trained model with its history, saved as a checkpoint in one piece."""

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.spf.certificate import Certificate
from geomkit.utils.display import Result
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class FineTuneResult(Result):
    """A trained model with the history of its training and, under SPF, the certificate.

    Attributes:
        model: The trained model, in eval mode.
        history: One row per logged step, which is every step unless ``logging_steps`` was given: ``step``, ``loss``,
            ``learning_rate``, ``grad_norm``, and SPF's measures.
        certificate: The first-order effect of each update on the safety loss; ``None`` without SPF.
        seconds: Wall time of the training.
    """

    model: "PreTrainedModel" = field(repr=False)
    history: "pd.DataFrame" = field(repr=False)
    certificate: Certificate | None
    seconds: float

    def to_frame(self) -> "pd.DataFrame":
        """Return the history."""
        return self.history

    def shown_frame(self) -> "pd.DataFrame":
        """Return ten rows of the history, evenly spaced, with the first and the last step."""
        import numpy as np

        count = len(self.history)
        places = np.unique(np.linspace(0, count - 1, min(count, 10)).round().astype(int))
        first = [name for name in ("step", "loss") if name in self.history]
        return self.history.iloc[places][[*first, *(name for name in self.history if name not in first)]]

    def plot(self) -> "Figure":
        """Draw the training loss by step."""
        return draw("plot_history", self)

    def save(self, folder: str | Path, tokenizer: "PreTrainedTokenizerBase") -> Path:
        """Write a checkpoint that ``from_pretrained`` loads; after a crash the folder has a whole checkpoint or none.

        Args:
            folder: The folder of the checkpoint, new or empty. In an empty folder, the configuration is written last.
            tokenizer: The model's tokenizer, which is saved in the same folder.

        Returns:
            The folder.

        Raises:
            DataError: If the folder exists and is not empty.
        """
        target = new_or_empty_folder(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target if target.exists() else target.parent
        with tempfile.TemporaryDirectory(dir=place, prefix=f".{target.name}-") as unfinished:
            with warnings.catch_warnings():  # of peft, for adapters on a GGUF file
                warnings.filterwarnings("ignore", "Could not find a config file")
                self.model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if self.certificate is not None:
                self.certificate.to_frame().to_json(Path(unfinished) / "spf.jsonl", orient="records", lines=True)
            if place == target:
                _move_files(Path(unfinished), target)
            else:
                Path(unfinished).chmod(0o755)
                Path(unfinished).rename(target)
                Path(unfinished).mkdir()  # for TemporaryDirectory to remove
        return Path(folder)

    def __str__(self) -> str:
        """Return the number of steps, the seconds, and the sentence of the certificate."""
        steps = int(self.history["step"].iloc[-1]) if len(self.history) else 0
        certificate = f"; {self.certificate}" if self.certificate else ""
        return f"Fine-tune of {steps} steps, {self.seconds:.0f} s{certificate}"


def new_or_empty_folder(folder: str | Path) -> Path:
    """Return the absolute path of a folder that is new or empty, or raise before any work is done.

    Args:
        folder: The folder; a link is followed.

    Returns:
        The folder's absolute path.

    Raises:
        DataError: If the folder exists and is not empty, or is a file.
    """
    path = Path(folder).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"expected a new or empty folder at {folder}, found something there; choose another --out")
    return path


def _move_files(source: Path, target: Path) -> None:
    """Move files into a folder that may not be replaced, such as a working directory, a mount or a link's target."""
    # The configuration comes last: before, from_pretrained finds no checkpoint, rather than an incomplete checkpoint.
    for path in sorted(source.iterdir(), key=lambda path: (path.name.endswith("config.json"), path.name)):
        path.rename(target / path.name)
