"""Where a batch's examples are in a tensor, as far as its shape tells."""

from typing import Literal

from torch import Tensor

Layout = Literal["certain", "doubtful", "mixed"]


def layout(value: Tensor, examples: int, length: int) -> Layout:
    """Tell how sure it is that a tensor holds the first example, then the second, and so on.

    Args:
        value: An input or output of some module; the last dimension of numbers that are no indices is features.
        examples: B, the batch size; not equal to the length, unless it is 1.
        length: L, the padded length.

    Returns:
        ``"certain"`` where only the first dimension has the batch's size and another has the length's; ``"doubtful"``
        where the size fits but another order would have it too, as with all positions in one dimension; ``"mixed"``
        where the examples are not apart, or it is tokens that happen to be as many as the examples.

    Example:
        >>> import torch
        >>> [layout(torch.zeros(shape), 2, 7) for shape in ((2, 7, 64), (14, 64), (7, 2, 64), (2, 64))]
        ['certain', 'doubtful', 'mixed', 'mixed']
    """
    shape = value.shape[:-1] if value.is_floating_point() or value.is_complex() else value.shape
    if examples == 1 or (shape.count(examples) == 1 == shape[:1].count(examples) and length in shape[1:]):
        return "certain"
    if shape[:1] == (examples * length,) or (shape[:1] == (examples,) and len(shape) > 1):
        return "doubtful"
    return "mixed"
