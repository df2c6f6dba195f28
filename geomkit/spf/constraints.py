"""Measuring the constraints of a step: gradients of the anchors at the current weights, and bounds on the update."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from geomkit.collection.collect import collect_from_tokens
from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import Batch
from geomkit.inputs.loss import TokenLoss, losses_of, token_losses
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.demands import Demands, Measured
from geomkit.spf.kl import ReferenceModel
from geomkit.spf.rule import Rule

_LEAST_DIVERGENCE = 1e-6
"""Divergence from the model before training, in nats per token, below which it is taken for rounding."""


@dataclass(frozen=True)
class BenignFence:
    """Benign examples that the model has to keep answering.

    Attributes:
        pool: The examples.
        margin: Tolerated excess of the examples' loss over its value before training, nats per token.
    """

    pool: AnchorPool
    margin: float


class ConstraintMeter:
    """Measures the constraints of a step: runs the anchors, and the benign examples of a fence, through the model.

    Args:
        model: The model.
        rule: The rule that the gradients are for.
        pool: The anchors.
        pad: The id that fills short rows.
        fence: Benign examples, if any.
        budget: See :class:`~geomkit.spf.demands.Demands`.
        progress: Show a bar while losses are measured, if that takes longer than five seconds.

    Attributes:
        reference_model: The model before training, for a rule with the KL loss.
        references: (anchors,) safety loss of each anchor before training, for a rule that corrects or weighs drift.
        benign_references: (examples,) loss of each benign example before training.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        pool: AnchorPool,
        pad: int,
        fence: BenignFence | None = None,
        budget: float = 0.5,
        progress: bool = False,
    ) -> None:
        """Measure the losses before training that the rule needs."""
        self._model, self._rule, self._pool, self._pad = model, rule, pool, pad
        self._fence, self._budget = fence, budget
        kl = rule.loss == "kl"
        self.reference_model = ReferenceModel.of(model, pool.rows, pad, progress=progress) if kl else None
        drifts = rule.drift_correction or rule.largest_weight
        before: list[float] = [0.0] * len(pool.rows) if kl else []
        if drifts and not kl:
            before = losses_of(model, pool.rows, pad, progress=progress, title="anchors before")
        self.references = np.array(before)
        benign = losses_of(model, fence.pool.rows, pad, progress=progress, title="benign before") if fence else []
        self.benign_references = np.array(benign)

    @property
    def fixed(self) -> bool:
        """Whether every step has the same anchors."""
        return self._pool.fixed

    def losses(self, indices: Sequence[int]) -> np.ndarray:
        """Return the safety loss of each anchor with these indices, nats per token."""
        rows = [self._pool.rows[index] for index in indices]
        return np.array(losses_of(self._model, rows, self._pad, token_loss=self._token_loss(indices)))

    def measure(self, step: int, blocks: Iterable[str]) -> Measured:
        """Collect the gradients of a step's constraints, and set their bounds.

        Under a rule with the KL loss the gradients are zero until the model has moved.

        Args:
            step: Number of the step, from 0.
            blocks: Names of the parameters to collect.

        Raises:
            CollectionError: If a loss or gradient is not finite.
        """
        # 1. Gradients: one constraint for each anchor, or one for the mean over the anchors.
        indices = self._pool.draw(step)
        rows = [self._pool.rows[index] for index in indices]
        per_anchor = self._rule.each_anchor and len(rows) > 1
        parts: dict[str, list[Tensor | None]] = defaultdict(list)
        safety = collect_from_tokens(
            self._model,
            rows,
            self._pad,
            per_sample=per_anchor,
            products=None if per_anchor or self._fence else lambda name, part: parts[name].append(part),
            token_loss=self._token_loss(indices),
        )
        constraints = list(safety.samples) if per_anchor else [safety]
        # 2. Bounds on Σ ⟨Δθ, g_i⟩: hard, 0 for a rule that constrains; soft, L_ref + margin − L_s where that is
        #    negative: the loss has drifted further than the margin, and this change brings it back to first order.
        references = self.references[list(indices)] if len(self.references) else np.full(len(rows), np.inf)
        drift = safety.loss - float(references.mean()) if len(self.references) else 0.0
        allowed = references if per_anchor else [references.mean()]
        distances = [
            reference + self._rule.drift_margin - constraint.loss
            for constraint, reference in zip(constraints, allowed, strict=True)
        ]
        weights = np.full(len(constraints), 1 / len(constraints))
        hard = np.full(len(constraints), 0.0 if self._rule.constrains else np.inf)
        corrects = self._rule.drift_correction
        soft = np.array([distance if corrects and distance < 0 else np.inf for distance in distances])
        # 3. The benign fence is one constraint more, with a soft bound and no part in the safety gradient.
        if self._fence is not None:
            benign, bound = self._benign(step, self._fence)
            constraints.append(benign)
            weights, hard, soft = np.append(weights, 0.0), np.append(hard, np.inf), np.append(soft, bound)
        by_block = {name: gradients for name in blocks if (gradients := _of_block(constraints, name))}
        products = _mean_products(parts, len(rows))
        # 4. Before the model has moved, the divergence and its gradient are rounding: there is nothing to protect yet.
        if self._rule.loss == "kl" and safety.loss < _LEAST_DIVERGENCE:
            by_block = {name: (zero_gradient(first.shape, first.device),) for name, (first,) in by_block.items()}
            products = {}
        return Measured(by_block, Demands(weights, hard, soft, self._budget), safety.loss, drift, indices, products)

    def _benign(self, step: int, fence: BenignFence) -> tuple[GradientSet, float]:
        """Return the gradient of the benign examples and its bound: ∞ while their loss is within the margin."""
        indices = fence.pool.draw(step)
        benign = collect_from_tokens(self._model, [fence.pool.rows[index] for index in indices], self._pad)
        allowed = float(self.benign_references[list(indices)].mean()) + fence.margin
        return benign, allowed - benign.loss if benign.loss > allowed else np.inf

    def _token_loss(self, indices: Sequence[int]) -> TokenLoss:
        if self.reference_model is None:
            return token_losses
        return partial(_divergences, self.reference_model, indices)

    def state(self) -> dict[str, Tensor]:
        """Return the measurements before training, which a resumed run needs."""
        before = [] if self.reference_model is None else self.reference_model.probabilities
        return {
            "references": torch.from_numpy(self.references),
            "benign_references": torch.from_numpy(self.benign_references),
            **{f"before.{index}": probabilities for index, probabilities in enumerate(before)},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load the measurements before training of another run with the same settings."""
        self.references, self.benign_references = (state[name].numpy() for name in ("references", "benign_references"))
        if self.reference_model is not None:
            before = self.reference_model.probabilities
            before[:] = [state[f"before.{index}"].cpu() for index in range(len(before))]


def _divergences(reference_model: ReferenceModel, indices: Sequence[int], model: nn.Module, batch: Batch) -> Tensor:
    return reference_model.losses(model, batch, indices)


def _mean_products(parts: Mapping[str, Sequence[Tensor | None]], examples: int) -> dict[str, Tensor]:
    """Return (1,) the mean ⟨W, g⟩ over the examples, for each parameter with a product in every part of the pass."""
    computed = {name: [part for part in products if part is not None] for name, products in parts.items()}
    return {
        name: torch.stack(products).sum(0, keepdim=True) / examples
        for name, products in computed.items()
        if len(products) == len(parts[name])
    }


def _of_block(constraints: Sequence[GradientSet], name: str) -> tuple[LayerGradient, ...]:
    """Return a block's gradient of each constraint; an empty tuple if all gradients are zero."""
    gradients = [constraint.layers.get(name) for constraint in constraints]
    present = [gradient for gradient in gradients if gradient is not None]
    if not any(gradient.norm > 0 for gradient in present):
        return ()
    shape, device = present[0].shape, present[0].device
    return tuple(zero_gradient(shape, device) if gradient is None else gradient for gradient in gradients)
