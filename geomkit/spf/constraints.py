"""Measuring the constraints of a step: the gradients of its anchors at the current weights, and what each may be."""

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
from geomkit.spf.rules import Rule


@dataclass(frozen=True)
class BenignFence:
    """Benign examples that the model should go on to answer.

    Attributes:
        pool: The examples.
        margin: How far their loss may exceed that of the model before training, nats per token.
    """

    pool: AnchorPool
    margin: float


class ConstraintMeter:
    """Runs the anchors, and the benign examples of a fence, at the current weights.

    Args:
        model: The model.
        rule: What the gradients are for.
        pool: The anchors.
        pad: The id that fills short rows.
        fence: Benign examples, if any.
        budget: See :class:`~geomkit.spf.demands.Demands`.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        pool: AnchorPool,
        pad: int,
        fence: BenignFence | None = None,
        budget: float = 0.5,
    ) -> None:
        """Measure what the model does before training, as far as the rule asks for it."""
        self._model, self._rule, self._pool, self._pad = model, rule, pool, pad
        self._fence, self._budget = fence, budget
        kl = rule.loss == "kl"
        self.teacher = ReferenceModel.of(model, pool.rows, pad) if kl else None
        drift = rule.drift_correction
        before = [0.0] * len(pool.rows) if kl else losses_of(model, pool.rows, pad) if drift else []
        self.references = np.array(before)
        self.benign_references = np.array(losses_of(model, fence.pool.rows, pad) if fence else [])

    @property
    def fixed(self) -> bool:
        """Whether every step has the same anchors."""
        return self._pool.fixed

    def losses(self, chosen: Sequence[int]) -> np.ndarray:
        """Return the safety loss of each of some anchors."""
        rows = [self._pool.rows[index] for index in chosen]
        return np.array(losses_of(self._model, rows, self._pad, token_loss=self._token_loss(chosen)))

    def measure(self, step: int, blocks: Iterable[str]) -> Measured:
        """Collect the gradients of the step's constraints.

        Args:
            step: Number of the step, from 0.
            blocks: The parameters to collect.

        Raises:
            CollectionError: If a loss or gradient is not finite.
        """
        chosen = self._pool.draw(step)
        rows = [self._pool.rows[index] for index in chosen]
        each = self._rule.each_anchor and len(rows) > 1
        told: dict[str, list[Tensor | None]] = defaultdict(list)
        safety = collect_from_tokens(
            self._model,
            rows,
            self._pad,
            per_sample=each,
            products=None if each or self._fence else lambda name, part: told[name].append(part),
            token_loss=self._token_loss(chosen),
        )
        sets = list(safety.samples) if each else [safety]
        references = self.references[list(chosen)] if len(self.references) else np.full(len(rows), np.inf)
        allowed = references if each else [references.mean()]
        bounds = [reference + self._rule.drift_margin - own.loss for own, reference in zip(sets, allowed, strict=True)]
        mean = np.full(len(sets), 1 / len(sets))
        firm = np.full(len(sets), 0.0 if self._rule.constrains else np.inf)
        drift = np.array([bound if self._rule.drift_correction and bound < 0 else np.inf for bound in bounds])
        if self._fence is not None:
            benign, bound = self._benign(step, self._fence)
            sets.append(benign)
            mean, firm = np.append(mean, 0.0), np.append(firm, np.inf)
            drift = np.append(drift, bound)
        return Measured(
            {name: found for name in blocks if (found := _of_block(sets, name))},
            Demands(mean, firm, drift, self._budget),
            safety.loss,
            chosen,
            _mean_products(told, len(rows)),
        )

    def _benign(self, step: int, fence: BenignFence) -> tuple[GradientSet, float]:
        """Return the gradient of the benign examples, and what an update may do: nothing is asked inside the fence."""
        chosen = fence.pool.draw(step)
        found = collect_from_tokens(self._model, [fence.pool.rows[index] for index in chosen], self._pad)
        allowed = float(self.benign_references[list(chosen)].mean()) + fence.margin
        return found, allowed - found.loss if found.loss > allowed else np.inf

    def _token_loss(self, chosen: Sequence[int]) -> TokenLoss:
        if self.teacher is None:
            return token_losses
        return partial(_divergences, self.teacher, chosen)

    def state(self) -> dict[str, Tensor]:
        """Return what is known of the model before training, for a run that is resumed."""
        said = {} if self.teacher is None else {f"teacher.{i}": one for i, one in enumerate(self.teacher.said)}
        return {
            "references": torch.from_numpy(self.references),
            "benign_references": torch.from_numpy(self.benign_references),
            **said,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what another run with the same settings knew."""
        self.references, self.benign_references = (state[name].numpy() for name in ("references", "benign_references"))
        if self.teacher is not None:
            device = self.teacher.said[0].device
            self.teacher.said = [state[f"teacher.{i}"].to(device) for i in range(len(self.teacher.said))]


def _divergences(teacher: ReferenceModel, chosen: Sequence[int], model: nn.Module, batch: Batch) -> Tensor:
    return teacher.losses(model, batch, chosen)


def _mean_products(told: Mapping[str, Sequence[Tensor | None]], examples: int) -> dict[str, Tensor]:
    """Return (1,) the mean product of each parameter of which every part is known."""
    known = {name: [part for part in parts if part is not None] for name, parts in told.items()}
    return {
        name: torch.stack(parts).sum(0, keepdim=True) / examples
        for name, parts in known.items()
        if len(parts) == len(told[name])
    }


def _of_block(sets: Sequence[GradientSet], name: str) -> tuple[LayerGradient, ...]:
    """Return a block's gradient in each set, if one of them is not zero."""
    found = [own.layers.get(name) for own in sets]
    known = [one for one in found if one is not None]
    if not any(one.norm > 0 for one in known):
        return ()
    shape, device = known[0].shape, known[0].device
    return tuple(zero_gradient(shape, device) if one is None else one for one in found)
