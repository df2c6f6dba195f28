"""Upper bounds that one step has to keep, and the measured gradients of its constraints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from geomkit.gradients.layer_gradient import LayerGradient


@dataclass(frozen=True, eq=False)
class Demands:
    """Upper bounds on Σ ⟨d, g_i⟩, summed over all blocks, for each of m constraints i on a step d.

    Attributes:
        safety_weights: (m,) weights of the constraints in the mean safety gradient; 0 for constraints that do not
            concern safety.
        hard_bounds: (m,) bounds that every step keeps; ∞ for no bound.
        soft_bounds: (m,) bounds for drift correction and the benign fence, kept as far as ``budget`` allows; ∞ for no
            bound.
        budget: Largest correction for the soft bounds, as a fraction of the norm of the step.
    """

    safety_weights: np.ndarray
    hard_bounds: np.ndarray
    soft_bounds: np.ndarray
    budget: float = np.inf

    @property
    def tightest_bounds(self) -> np.ndarray:
        """(m,) the smaller of the hard and the soft bound."""
        return np.asarray(np.minimum(self.hard_bounds, self.soft_bounds))

    def only_hard(self) -> "Demands":
        """Return the demands without soft bounds."""
        return replace(self, soft_bounds=np.full_like(self.soft_bounds, np.inf))

    def only_soft(self) -> "Demands":
        """Return the demands without hard bounds."""
        return replace(self, hard_bounds=np.full_like(self.hard_bounds, np.inf))


@dataclass(frozen=True, eq=False)
class Measured:
    """The constraints, measured at one point of training.

    Attributes:
        gradients: For each block the gradients of the m constraints.
        demands: Bounds on the update.
        loss: Safety loss on the anchors, nats per token.
        drift: Excess of ``loss`` over its value before training, nats per token; 0 where the rule does not need it.
        anchor_indices: Indices of the anchors in the pool.
        products: (m,) ⟨W, g_i⟩ in fp64, for the parameters W whose products the pass over the anchors has computed:
            ``dots`` of a :class:`~geomkit.spf.projection.reading.Reading` that need not be read.
    """

    gradients: Mapping[str, tuple[LayerGradient, ...]]
    demands: Demands
    loss: float
    drift: float
    anchor_indices: Sequence[int]
    products: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def has_gradient(self) -> bool:
        """Whether the gradient of a constraint is not zero."""
        return any(gradient.norm > 0 for gradients in self.gradients.values() for gradient in gradients)
