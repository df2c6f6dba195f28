"""Loading of saved gradients, without the model that they were collected from."""

from pathlib import Path

import torch
from torch import nn

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import check_model
from geomkit.gradients.summed import SumGradient
from geomkit.utils.saved_files import damaged
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
    gradients = load("gradients", folder, GradientSet)
    for name, gradient in (pair for part in (gradients, *gradients.samples) for pair in part.items()):
        if not _consistent(gradient):
            raise damaged("gradients", Path(folder), f"tensors of {name!r:.60} that do not fit together")
    if model is not None:
        shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
        check_model(model, gradients.provenance, f"the gradients in {folder}", shapes, tuple)
    return gradients


def _consistent(gradient: LayerGradient) -> bool:
    """Return whether the tensors of a gradient have the types and shapes that its class describes."""
    if not all(tensor.is_floating_point() for tensor in gradient.tensors):
        return False
    match gradient:
        case SumGradient(parts=parts):
            return all(map(_consistent, parts))
        case FactoredGradient(left=left, right=right):
            return left.ndim == right.ndim == 2 and len(left) == len(right)
        case IndexedGradient(indices=indices, rows=rows, size=size):
            if indices.ndim != 1 or indices.dtype != torch.int64 or rows.ndim != 2 or len(indices) != len(rows):
                return False
            within = not len(indices) or (int(indices[0]) >= 0 and int(indices[-1]) < size)
            return within and bool((indices.diff() > 0).all())
    return isinstance(gradient, DenseGradient)
