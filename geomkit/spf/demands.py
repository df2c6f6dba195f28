"""What is asked of one step: the measured constraints and their bounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from geomkit.gradients.layer_gradient import LayerGradient


@dataclass(frozen=True, eq=False)
class Demands:
    """What is asked of Σ ⟨d, g_i⟩ over all blocks, for each constraint i.

    Attributes:
        mean: (m,) weights of the constraints in the mean safety gradient; 0 for those that are not about safety.
        firm: (m,) bounds that every step keeps, ∞ for none.
        drift: (m,) bounds that are kept as far as ``budget`` allows, for drift and the benign fence; ∞ for none.
        budget: The most that may be added for these, as a share of the norm of the step.
    """

    mean: np.ndarray
    firm: np.ndarray
    drift: np.ndarray
    budget: float = np.inf

    @property
    def wanted(self) -> np.ndarray:
        """(m,) the lower of the two bounds."""
        return np.asarray(np.minimum(self.firm, self.drift))

    def only_firm(self) -> "Demands":
        """Return what is asked at once."""
        return replace(self, drift=np.full_like(self.drift, np.inf))

    def only_drift(self) -> "Demands":
        """Return what is asked for drift and the fence alone."""
        return replace(self, firm=np.full_like(self.firm, np.inf))


@dataclass(frozen=True, eq=False)
class Measured:
    """The constraints at one point of training.

    Attributes:
        gradients: The gradient of each constraint, by block.
        demands: What is asked of the update.
        loss: Safety loss on the anchors, nats per token.
        chosen: The anchors.
        products: (m,) ⟨W, g⟩ for the gradient of each constraint, fp64, of the parameters of which the pass over the
            anchors told it: :class:`~geomkit.spf.projection.reading.Reading` ``dots`` that need not be read.
    """

    gradients: Mapping[str, tuple[LayerGradient, ...]]
    demands: Demands
    loss: float
    chosen: Sequence[int]
    products: Mapping[str, Tensor] = field(default_factory=dict)
