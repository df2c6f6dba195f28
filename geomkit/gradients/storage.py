"""Saving gradients and subspaces, and loading them again without the model."""

from pathlib import Path

from torch import nn

from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.provenance import check_model
from geomkit.utils.saving import load


def load_gradients(folder: str | Path, model: nn.Module | None = None) -> GradientSet:
    """Load gradients that :meth:`~geomkit.gradients.gradient_set.GradientSet.save` wrote, bit for bit, on the CPU.

    Args:
        folder: Where they were saved.
        model: Refuse them unless they were collected from this model with these weights.

    Returns:
        The gradients. Their numbers are read from the file when first used.

    Raises:
        DataError: If there are none, the files are damaged or do not belong together, a later version wrote them, or
            they were collected from another model; the message says how it differs.
    """
    gradients: GradientSet = load("gradients", folder)
    if model is not None:
        shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
        check_model(model, gradients.provenance, f"the gradients in {folder}", shapes, tuple)
    return gradients
