"""Gradient geometry along training: one probe repeated every few steps of a run, or on several checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomkit.analysis.analysis import Analysis
from geomkit.analysis.probe import Probe
from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet, set_inner
from geomkit.inputs.models import load_model
from geomkit.svd.principal_angles import principal_angles
from geomkit.svd.subspaces import Subspace, layer_subspace
from geomkit.utils.arguments import is_whole, type_in_words
from geomkit.utils.display import counted, html_table
from geomkit.utils.figures import DrawnResult, draw
from geomkit.utils.readable import with_interval
from geomkit.utils.workers import first_process

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MOVED = "has it moved?"


@dataclass(frozen=True, eq=False)
class TrajectoryPoint:
    """The results of a probe at one moment of training.

    Attributes:
        analysis: The analysis of the model at this moment.
        cosine: Cosine of the mean safety gradients of this moment and of the first moment, over all parameters.
        overlap: Overlap of the leading safety subspaces of this moment and of the first moment, mean over parameters.
        expected: Expected overlap of random subspaces of the same rank, mean over parameters.
    """

    analysis: Analysis = field(repr=False)
    cosine: float
    overlap: float
    expected: float

    def to_frame(self) -> "pd.DataFrame":
        """Return :meth:`Analysis.to_frame` with two more rows: how far safety has moved since the first moment."""
        import pandas as pd

        moved = [
            (_MOVED, "cosine with the start", "safety", self.cosine, 0.0),
            (_MOVED, "overlap with the start", "safety", self.overlap, self.expected),
        ]
        rows = pd.DataFrame(moved, columns=["question", "measure", "of", "value", "null"])
        return pd.concat([self.analysis.to_frame(), rows], ignore_index=True)


@dataclass(frozen=True, eq=False)
class Trajectory(DrawnResult):
    """The results of a probe at several moments of training.

    Attributes:
        moments: The results by optimizer step, or by the name of a checkpoint, in order.
    """

    moments: Mapping[int | str, TrajectoryPoint]

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per moment and measure: ``at``, then the columns of :meth:`TrajectoryPoint.to_frame`."""
        import pandas as pd

        frames = [point.to_frame().assign(at=at) for at, point in self.moments.items()]
        frame = pd.concat(frames, ignore_index=True)
        return frame[["at", *(name for name in frame.columns if name != "at")]]

    def shown_frame(self) -> "pd.DataFrame":
        """Return the measures of all sets as texts, with a column per moment."""
        frame = self.to_frame()
        rows = zip(*(frame[name] for name in ("of", "value", "low", "high")), strict=True)
        cells = [with_interval(value, (low, high), sign="−" in of) for of, value, low, high in rows]
        return (
            frame.assign(cell=cells)
            .pivot_table(index=["question", "measure", "of"], columns="at", values="cell", aggfunc="first", sort=False)
            .rename_axis(columns=None)
            .reset_index()
        )

    def _repr_html_(self) -> str:
        return html_table(str(self), self.shown_frame(), rows=50)

    def plot(self) -> "Figure":
        """Draw every measure over training, see :func:`geomkit.plots.trajectory.plot_trajectory`."""
        return draw("plot_trajectory", self)

    def __str__(self) -> str:
        """Return a sentence on how far safety moved between the first and the last moment."""
        (start, *_), (end, last) = self.moments, list(self.moments.items())[-1]
        return (
            f"{counted(len(self.moments), 'moment')} from {start} to {end}: the mean safety gradient at the end has "
            f"cosine {last.cosine:+.3f} with that at the start, its leading subspace overlap {last.overlap:.3f} "
            f"(random subspaces {last.expected:.3f})"
        )


class Tracker:
    """Repeats one probe on a model at several moments, and compares each moment with the first.

    Args:
        probe: The probe.

    Raises:
        GeometryError: If ``probe`` is no :class:`~geomkit.Probe`.
    """

    def __init__(self, probe: Probe) -> None:
        """Keep the probe; no moment has been measured yet."""
        if not isinstance(probe, Probe):
            raise GeometryError(f"expected a probe, found {type_in_words(probe)}; make one with geomkit.Probe")
        self._probe = probe
        self._first: tuple[GradientSet, Subspace] | None = None
        self._moments: dict[int | str, TrajectoryPoint] = {}

    def measure_at(self, at: int | str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Measure the model as it is now, and keep the results under ``at``; the model's state is restored.

        Raises:
            GeometryError: If the model has other parameters than at the first moment.
        """
        safety, utility, control = self._probe.collect(model, tokenizer)
        subspace = _leading_subspace(safety, self._probe.rank)
        if self._first is None:
            self._first = replace(safety, samples=()), subspace
        first_safety, first_subspace = self._first
        angles = principal_angles(subspace, first_subspace)
        self._moments[at] = TrajectoryPoint(
            analysis=self._probe.measure(safety, utility, control, refusal=self._probe.refusal(model, tokenizer)),
            cosine=set_inner(safety, first_safety) / (safety.norm * first_safety.norm),
            overlap=angles.mean_overlap,
            expected=angles.mean_expected_overlap,
        )

    def __contains__(self, at: object) -> bool:
        """Return whether the model was measured at a step or checkpoint."""
        return at in self._moments

    @property
    def trajectory(self) -> Trajectory:
        """The results so far.

        Raises:
            GeometryError: If no moment was measured yet.
        """
        if not self._moments:
            raise GeometryError("expected at least one moment of training, found none; train with this callback first")
        return Trajectory(dict(self._moments))


def _leading_subspace(gradients: GradientSet, rank: int) -> Subspace:
    """Return the leading left subspaces; a gradient of lower rank gets a smaller subspace, without a warning."""
    matrices = gradients.matrices().items()
    return Subspace("left", {name: layer_subspace(matrix, rank=rank, parameter=name) for name, matrix in matrices})


def track(
    checkpoints: "Mapping[int | str, PreTrainedModel | str | Path]",
    tokenizer: "PreTrainedTokenizerBase",
    probe: Probe,
    *,
    progress: bool = True,
) -> Trajectory:
    """Measure several checkpoints of a model with one probe, and compare each checkpoint with the first.

    Args:
        checkpoints: Checkpoints in order, by step or name: models, or folders and hub ids, which
            :func:`geomkit.load_model` loads one at a time.
        tokenizer: The tokenizer of all checkpoints.
        probe: The probe.
        progress: Show a bar.

    Returns:
        The results, by step or name.

    Raises:
        GeometryError: If there is no checkpoint, ``checkpoints`` is no mapping, two checkpoints have different
            parameters, or ``probe`` is no probe.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> probe = gk.Probe(gk.load_examples("safety"), gk.load_examples("utility"), examples=3, layers="*.mlp.*")
        >>> models = {"base": gk.load_organism("base")[0], "aligned": model}
        >>> trajectory = track(models, tokenizer, probe, progress=False)
        >>> list(trajectory.moments), round(trajectory.moments["base"].cosine, 6)
        (['base', 'aligned'], 1.0)
    """
    from tqdm.auto import tqdm

    tracker = Tracker(probe)
    if not isinstance(checkpoints, Mapping):
        raise GeometryError(f"expected checkpoints by step or name, found {type_in_words(checkpoints)}; give a dict")
    hidden = not (progress and first_process())
    for at, checkpoint in tqdm(checkpoints.items(), desc="track", unit="checkpoint", disable=hidden):
        model = load_model(checkpoint)[0] if isinstance(checkpoint, str | Path) else checkpoint
        tracker.measure_at(at, model, tokenizer)
    return tracker.trajectory


class GeometryCallback(TrainerCallback):
    """Measures a model with a probe before training, every ``every`` steps, and after training.

    The model's weights, gradients and modes and the random states are restored, so the training is the same as without
    the callback. For ``transformers.Trainer``, and for :func:`geomkit.finetune` as one of its ``callbacks``.

    Args:
        probe: The probe; with few examples, it is quick.
        every: Optimizer steps between two moments.
        tokenizer: The model's tokenizer; :func:`geomkit.finetune` and the Trainer pass theirs.

    Raises:
        GeometryError: If ``probe`` is no probe, or ``every`` is below one; at the beginning of training, if there is no
            tokenizer.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> safety, train = gk.load_examples("safety"), gk.load_examples("scenarios/new-skill")
        >>> watch = GeometryCallback(gk.Probe(safety, train, examples=3, layers="*.mlp.*"), every=2)
        >>> _ = gk.finetune(model, tokenizer, train, steps=3, callbacks=[watch], progress=False)
        >>> list(watch.trajectory.moments)
        [0, 2, 3]
    """

    def __init__(self, probe: Probe, *, every: int = 10, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        """Keep the probe and the distance between moments."""
        if not is_whole(every, 1):
            raise GeometryError(f"expected a number of steps of at least 1, found every={every!r}; give e.g. 10")
        self._tracker = Tracker(probe)
        self._probe, self._every, self._tokenizer = probe, every, tokenizer

    @property
    def trajectory(self) -> Trajectory:
        """The results so far, also after training broke off.

        Raises:
            GeometryError: If training has not begun.
        """
        return self._tracker.trajectory

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the results of an earlier run, and measure the model before the first step."""
        self._tracker = Tracker(self._probe)
        self._measure(state.global_step, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the model after every ``every`` steps."""
        if state.global_step % self._every == 0:
            self._measure(state.global_step, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the trained model, unless its last step was measured."""
        if state.global_step not in self._tracker:
            self._measure(state.global_step, kwargs)

    def _measure(self, step: int, keywords: Mapping[str, Any]) -> None:
        """Measure the model that the Trainer has given to the callback."""
        tokenizer = self._tokenizer or keywords.get("processing_class")
        if tokenizer is None:
            raise GeometryError("expected a tokenizer for the examples, found none; pass GeometryCallback(tokenizer=…)")
        self._tracker.measure_at(step, keywords["model"], tokenizer)
