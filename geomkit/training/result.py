"""The result of a fine-tune: the trained model with its history, saved as a checkpoint in one piece."""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from geomkit.errors import DataError
from geomkit.spf.certificate import Certificate
from geomkit.spf.step_record import LOG_NAME
from geomkit.training.card import model_card
from geomkit.utils.display import counted
from geomkit.utils.figures import DrawnResult, draw, is_figure_file
from geomkit.utils.files import reading, writing
from geomkit.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class FineTuneResult(DrawnResult):
    """A trained model with the history of its training and, under SPF, the certificate.

    Attributes:
        model: The trained model, in eval mode.
        history: One row per logged step, which is every step unless ``logging_steps`` was given: ``step``, ``loss``,
            ``learning_rate``, ``grad_norm``, and SPF's measures.
        certificate: The first-order effect of each update on the safety loss; ``None`` without SPF.
        seconds: Wall time of the training.
        interrupted: Whether the training ended before its last step, by Ctrl-C or a notebook's stop button.
        settings: What the model card says of the settings, in parts.
        steps: Number of optimizer steps; ``None`` stands for the last logged one.
    """

    model: "PreTrainedModel" = field(repr=False)
    history: "pd.DataFrame" = field(repr=False)
    certificate: Certificate | None
    seconds: float
    interrupted: bool = False
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict, repr=False)
    steps: int | None = None

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

    def save(self, path: str | Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Path:
        """Write a checkpoint that ``from_pretrained`` loads; after a crash the folder has a whole checkpoint or none.

        Beside the model and its tokenizer are the model card, ``README.md``, and under SPF the certificate,
        ``spf.jsonl``.

        Args:
            path: The folder of the checkpoint, new or empty. In an empty folder, the configuration is written last.
                Where the path ends in ``.png``, ``.svg``, ``.pdf`` or ``.html``, the figure is written to it instead.
            tokenizer: The model's tokenizer, which is saved in the same folder; a figure needs none.

        Returns:
            The path.

        Raises:
            DataError: If the folder exists and is not empty, there is no tokenizer for a checkpoint, or the files
                cannot be written.
        """
        if is_figure_file(path):
            return super().save(path)
        if tokenizer is None:
            raise DataError(
                f"expected a tokenizer for the checkpoint in '{path}', found none; give save(folder, tokenizer), or "
                "the name of a figure such as 'history.png'"
            )
        target = new_or_empty_folder(path)
        with writing(path):
            self._write(target, tokenizer)
        return Path(path)

    def _write(self, target: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Write the files of a checkpoint under another name, and move them to the folder when they are complete."""
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target if target.exists() else target.parent
        with tempfile.TemporaryDirectory(dir=place, prefix=f".{target.name}-") as unfinished:
            with warnings.catch_warnings():  # of peft, for adapters on a GGUF file
                warnings.filterwarnings("ignore", "Could not find a config file")
                self.model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if self.certificate is not None:
                lines = "".join(record.to_json() + "\n" for record in self.certificate.records)
                (Path(unfinished) / LOG_NAME).write_text(lines, encoding="utf-8")
            (Path(unfinished) / "README.md").write_text(self.card(), encoding="utf-8")
            if place == target:
                _move_files(Path(unfinished), target)
            else:
                Path(unfinished).chmod(0o755)
                Path(unfinished).rename(target)
                Path(unfinished).mkdir()  # for TemporaryDirectory to remove

    def card(self) -> str:
        """Return the model card: what was trained, what was protected and how, and what that does not promise."""
        return model_card(self.model, self.settings, self.history, self.certificate, interrupted=self.interrupted)

    def push_to_hub(
        self,
        repo_id: str,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a model fine-tuned with geomkit",
    ) -> str:
        """Upload the checkpoint with its tokenizer, model card and certificate to the Hugging Face hub, in one commit.

        Args:
            repo_id: The repository, such as ``"name/my-model"``, which is made if there is none.
            tokenizer: The model's tokenizer.
            private: Whether a new repository is private; the account's default when left out.
            token: The token of the account; the one that ``hf auth login`` stored when left out.
            commit_message: Message of the commit.

        Returns:
            The address of the commit.

        Raises:
            DataError: If the hub refuses the upload or cannot be reached.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        # The base class of a lost connection's error is that of the HTTP client, which changes between hub versions.
        network = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
        expected: tuple[type[Exception], ...] = (OSError, ValueError, *network)
        api = HfApi(token=token, library_name="geomkit", library_version=__version__)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, tokenizer)
            try:
                made = api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=commit_message)
            except expected as error:
                raise DataError(
                    f"expected the hub to take {repo_id}, found {' '.join(str(error).split())}; check the name, the "
                    "network and the token (hf auth login)"
                ) from error
        return str(commit.commit_url)

    def __str__(self) -> str:
        """Return the number of steps, the seconds, and the sentence of the certificate."""
        logged = int(self.history["step"].iloc[-1]) if len(self.history) else 0
        steps = logged if self.steps is None else self.steps
        certificate = f"; {self.certificate}" if self.certificate else ""
        interrupted = ", interrupted" if self.interrupted else ""
        return f"Fine-tune of {counted(steps, 'step')}, {self.seconds:.0f} s{interrupted}{certificate}"


def new_or_empty_folder(folder: str | Path) -> Path:
    """Return the absolute path of a folder that is new or empty, or raise before any work is done.

    Args:
        folder: The folder; a link is followed.

    Returns:
        The folder's absolute path.

    Raises:
        DataError: If the folder exists and is not empty, is a file, or cannot be read.
    """
    path = Path(folder).resolve()
    with reading(folder):
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if taken:
        raise DataError(f"expected a new or empty folder at {folder}, found something there; choose another --out")
    return path


def _move_files(source: Path, target: Path) -> None:
    """Move files into a folder that may not be replaced, such as a working directory, a mount or a link's target."""
    # The configuration comes last: before, from_pretrained finds no checkpoint, rather than an incomplete checkpoint.
    for path in sorted(source.iterdir(), key=lambda path: (path.name.endswith("config.json"), path.name)):
        path.rename(target / path.name)
