"""Loading of saved gradients, without the model that they were collected from."""

from pathlib import Path

from torch import nn

from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.provenance import check_model
from geomkit.utils.saving import load


def load_gradients(folder: str | Path, model: nn.Module | None = None) -> GradientSet:
    """Return gradients that :meth:`~geomkit.gradients.gradient_set.GradientSet.save` wrote, bit for bit, on the CPU.

    Args:
        folder: Folder of the saved gradients.
        model: Model to compare with: an error is raised unless the gradients are from this model with these weights.

    Returns:
        The gradients. Numbers are read from the file at their first use.

    Raises:
        DataError: If the folder has no gradients, the files are damaged or do not belong together, a later version of
            geomkit wrote them, or they are from another model; the message says how it differs.
    """
    gradients: GradientSet = load("gradients", folder)
    if model is not None:
        shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
        check_model(model, gradients.provenance, f"the gradients in {folder}", shapes, tuple)
    return gradients
