"""Where a batch's examples are in a tensor, as far as its shape tells."""

from typing import Literal

import torch

Layout = Literal["certain", "doubtful", "mixed"]


def layout(shape: torch.Size, examples: int, length: int) -> Layout:
    """Tell how sure it is that a tensor holds the first example, then the second, and so on.

    Args:
        shape: Shape of an input or output of some module.
        examples: B, the batch size; not equal to the length, unless it is 1.
        length: L, the padded length.

    Returns:
        ``"certain"`` where only the first dimension has the batch's size and another has the length's; ``"doubtful"``
        where the size fits but another order would have it too, as with all positions in one dimension; ``"mixed"``
        where the examples are not apart.

    Example:
        >>> [layout(torch.Size(shape), 2, 7) for shape in ((2, 7, 64), (14, 64), (7, 2, 64))]
        ['certain', 'doubtful', 'mixed']
    """
    if examples == 1 or (shape[:-1].count(examples) == 1 == shape[:1].count(examples) and length in shape[1:]):
        return "certain"
    return "doubtful" if shape[:1] in {(examples,), (examples * length,)} else "mixed"
