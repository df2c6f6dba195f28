"""How the geometry moves in training: one probe, put to a model every so many steps or checkpoint by checkpoint."""

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
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MOVED = "has it moved?"


@dataclass(frozen=True, eq=False)
class TrajectoryPoint:
    """What a probe found at one moment of training.

    Attributes:
        analysis: The three questions, answered.
        cosine: Cosine of the mean safety gradient with that of the first moment, over all parameters.
        overlap: Overlap of the leading safety subspace with that of the first moment, mean over parameters.
        expected: The overlap of random subspaces of that rank.
    """

    analysis: Analysis = field(repr=False)
    cosine: float
    overlap: float
    expected: float

    def to_frame(self) -> "pd.DataFrame":
        """Return :meth:`Analysis.to_frame` and two rows more, on how far safety has moved since the first moment."""
        import pandas as pd

        moved = [
            (_MOVED, "cosine with the start", "safety", self.cosine, 0.0),
            (_MOVED, "overlap with the start", "safety", self.overlap, self.expected),
        ]
        rows = pd.DataFrame(moved, columns=["question", "measure", "of", "value", "null"])
        return pd.concat([self.analysis.to_frame(), rows], ignore_index=True)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a probe found at several moments of training.

    Attributes:
        moments: By optimizer step, or by the name of a checkpoint, in order.
    """

    moments: Mapping[int | str, TrajectoryPoint]

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per moment and measure: ``at``, then the columns of :meth:`TrajectoryPoint.to_frame`."""
        import pandas as pd

        frames = [moment.to_frame().assign(at=at) for at, moment in self.moments.items()]
        frame = pd.concat(frames, ignore_index=True)
        return frame[["at", *(name for name in frame.columns if name != "at")]]

    def plot(self) -> "Figure":
        """Draw it, see :func:`geomkit.plots.trajectory.plot_trajectory`."""
        return draw("plot_trajectory", self)

    def __str__(self) -> str:
        """Say how far safety moved between the first and the last moment."""
        (start, *_), (end, last) = self.moments, list(self.moments.items())[-1]
        return (
            f"{counted(len(self.moments), 'moment')} from {start} to {end}: the mean safety gradient at the end has "
            f"cosine {last.cosine:+.3f} with that at the start, its leading subspace overlap {last.overlap:.3f} "
            f"(random subspaces {last.expected:.3f})"
        )

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


class Tracker:
    """Puts one probe to a model at several moments.

    Args:
        probe: What to measure.

    Raises:
        GeometryError: If it is no probe.
    """

    def __init__(self, probe: Probe) -> None:
        """Start with nothing."""
        if not isinstance(probe, Probe):
            raise GeometryError(f"expected a probe, found {type_in_words(probe)}; make one with geomkit.Probe")
        self._probe = probe
        self._first: tuple[GradientSet, Subspace] | None = None
        self._moments: dict[int | str, TrajectoryPoint] = {}

    def look(self, at: int | str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Measure the model as it is now; it is left as found, in the middle of a training step too."""
        safety, utility, control = self._probe.collect(model, tokenizer)
        own = _leading(safety, self._probe.rank)
        if self._first is None:
            self._first = replace(safety, samples=()), own
        gradient, start = self._first
        angles = principal_angles(own, start)
        self._moments[at] = TrajectoryPoint(
            analysis=self._probe.measure(safety, utility, control),
            cosine=set_inner(safety, gradient) / (safety.norm * gradient.norm),
            overlap=angles.mean_overlap,
            expected=angles.mean_expected_overlap,
        )

    def __contains__(self, at: object) -> bool:
        """Say whether the model was measured there."""
        return at in self._moments

    @property
    def trajectory(self) -> Trajectory:
        """What was found so far.

        Raises:
            GeometryError: If nothing was measured yet.
        """
        if not self._moments:
            raise GeometryError("expected at least one moment of training, found none; train with this callback first")
        return Trajectory(dict(self._moments))


def _leading(gradients: GradientSet, rank: int) -> Subspace:
    """Return the leading left subspaces, of as many directions as there are, without a word about it."""
    matrices = gradients.matrices().items()
    return Subspace("left", {name: layer_subspace(found, rank=rank, parameter=name) for name, found in matrices})


def track(
    checkpoints: "Mapping[int | str, PreTrainedModel | str | Path]",
    tokenizer: "PreTrainedTokenizerBase",
    probe: Probe,
    *,
    progress: bool = True,
) -> Trajectory:
    """Put a probe to several checkpoints of a model, in order; the first is what the others are compared with.

    Args:
        checkpoints: Models, or folders and hub ids that :func:`geomkit.load_model` loads one at a time, by step or
            name.
        tokenizer: The tokenizer of all of them.
        probe: What to measure.
        progress: Show a bar.

    Returns:
        What was found, by step or name.

    Raises:
        GeometryError: If there is no checkpoint, they have no names or not the same parameters, or there is no probe.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> probe = gk.Probe(gk.load_examples("safety"), gk.load_examples("utility"), examples=3, layers="*.mlp.*")
        >>> found = track({"base": gk.load_organism("base")[0], "aligned": model}, tokenizer, probe, progress=False)
        >>> list(found.moments), round(found.moments["base"].cosine, 6)
        (['base', 'aligned'], 1.0)
    """
    from tqdm.auto import tqdm

    tracker = Tracker(probe)
    if not isinstance(checkpoints, Mapping):
        raise GeometryError(f"expected checkpoints by step or name, found {type_in_words(checkpoints)}; give a dict")
    for at, checkpoint in tqdm(checkpoints.items(), desc="track", unit="checkpoint", disable=not progress):
        model = load_model(checkpoint)[0] if isinstance(checkpoint, str | Path) else checkpoint
        tracker.look(at, model, tokenizer)
    return tracker.trajectory


class GeometryCallback(TrainerCallback):
    """Puts a probe to the model before training, every so many steps, and at the end.

    The weights, gradients, random states and mode of the model in training are left as found, so the run is the same
    with it and without. For ``transformers.Trainer``, and for :func:`geomkit.finetune` by ``callbacks=``.

    Args:
        probe: What to measure; few examples keep it quick.
        every: Optimizer steps from one moment to the next.
        tokenizer: The model's tokenizer; :func:`geomkit.finetune` and the Trainer bring their own.

    Raises:
        GeometryError: If there is no probe, or ``every`` is below one; at the beginning of training, if there is no
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
        """Keep what to measure, and when."""
        if not is_whole(every, 1):
            raise GeometryError(f"expected a number of steps of at least 1, found every={every!r}; give e.g. 10")
        self._tracker = Tracker(probe)
        self._probe, self._every, self._tokenizer = probe, every, tokenizer

    @property
    def trajectory(self) -> Trajectory:
        """What was found so far, also after training broke off.

        Raises:
            GeometryError: If training has not begun.
        """
        return self._tracker.trajectory

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run and measure the model as it is before the first step."""
        self._tracker = Tracker(self._probe)
        self._look(state.global_step, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure after every so many steps."""
        if state.global_step % self._every == 0:
            self._look(state.global_step, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the trained model."""
        if state.global_step not in self._tracker:
            self._look(state.global_step, kwargs)

    def _look(self, step: int, found: Mapping[str, Any]) -> None:
        tokenizer = self._tokenizer or found.get("processing_class")
        if tokenizer is None:
            raise GeometryError("expected a tokenizer for the examples, found none; pass GeometryCallback(tokenizer=…)")
        self._tracker.look(step, found["model"], tokenizer)
