"""One rule: how a step that conflicts with safety is changed, and what then holds of the applied update.

A *step* d is the optimizer's update Δθ, or −g_u where the utility gradient itself is projected. To first order a step
changes the safety loss by ⟨d, g_s⟩, so a step *conflicts* with safety when ⟨d, g_s⟩ > 0.
"""

from dataclasses import dataclass
from typing import Literal

from geomkit.errors import SPFError

Level = Literal["gradient", "update"]
Scope = Literal["global", "block"]
RemovalKind = Literal["rank1", "left", "two-sided", "random", "norm-matched", "none"]
Promise = Literal["every block", "every anchor", "subspace", "nothing"]
Badge = Literal["geomkit", "replicated", "published code", "from its formula", "baseline", "control"]
SafetyLoss = Literal["refusal", "kl"]

_SUBSPACES = ("left", "two-sided", "random")
PROSE = ("badge", "source", "formula", "promise_text", "test", "when")
"""The fields of a rule that describe it and change nothing of what it computes."""

_WEIGHT_UNIT = 0.003
"""Drift of the safety loss, nats per token, above which a weight that may grow does."""


@dataclass(frozen=True)
class Rule:
    """How a step that conflicts with safety is changed.

    Attributes:
        name: The rule's name in :data:`~geomkit.spf.rules.RULES`.
        level: ``"gradient"``: the utility gradient is projected and then handed to the optimizer, whose momentum,
            preconditioner and weight decay may bring the conflict back. ``"update"``: the optimizer's own update is
            projected, so the constraint holds for the update that is applied.
        scope: ``"global"`` tests the conflict once for the sum over all blocks, ``"block"`` once for each block.
        removal: Part of a conflicting step that is removed. ``"rank1"``: the component along g_s; ``"left"``: the part
            in the span of the top ``rank`` left singular vectors of g_s; ``"two-sided"``: the parts in the spans of the
            left and of the right singular vectors; ``"random"``: the part in a random subspace; ``"norm-matched"``: a
            random direction, scaled to the norm that ``"rank1"`` would remove; ``"none"``: no part.
        badge: Origin of the rule: ``"geomkit"``, ``"replicated"`` (independently implemented from the paper),
            ``"published code"``, ``"from its formula"`` (no code is available), ``"baseline"`` or ``"control"``.
        source: The paper or code, and the differences from it.
        formula: What a conflicting step becomes.
        promise_text: What is promised of the applied update, in words; see :attr:`promise`.
        test: The test that compares the rule with numpy.
        when: When to choose the rule.
        rank: Rank k of the subspaces; 0 for a rule without a subspace.
        each_anchor: Whether the gradient of every anchor is a constraint, rather than the gradient of the mean loss.
        closed_subspace: Whether the subspace is removed from every step, conflicting or not, and never recomputed.
        safety_gradient_weight: Multiple w of g_s that is added to the utility gradient.
        largest_weight: Largest multiple of g_s: where this is above w, the multiple grows with the drift of the safety
            loss, see :meth:`weight_at`; 0 for a multiple that is always w.
        loss: ``"refusal"``: cross-entropy on the anchors' refusals; ``"kl"``: KL divergence from the model before
            training, on the same tokens.
        drift_correction: Whether to undo, to first order, the increase of the safety loss that earlier steps caused
            beyond first order: where the anchors' loss L_s exceeds its value L_ref before training, the applied update
            must satisfy Σ ⟨Δθ, g_s⟩ ≤ L_ref − L_s.
        drift_margin: Tolerated excess of L_s over L_ref, nats per token: drift is corrected above L_ref +
            ``drift_margin``, back to that value.
    """

    name: str
    level: Level
    scope: Scope
    removal: RemovalKind
    badge: Badge = "geomkit"
    source: str = ""
    formula: str = ""
    promise_text: str = "nothing"
    test: str = ""
    when: str = ""
    rank: int = 0
    each_anchor: bool = False
    closed_subspace: bool = False
    safety_gradient_weight: float = 0.0
    largest_weight: float = 0.0
    loss: SafetyLoss = "refusal"
    drift_correction: bool = False
    drift_margin: float = 0.0

    def __post_init__(self) -> None:
        """Check that the settings fit together.

        Raises:
            SPFError: If two settings contradict each other.
        """
        conditions = [
            (self.has_subspace != (self.rank > 0), "a rank for a rule that removes a subspace, and for no other"),
            (self.closed_subspace and self.removal != "left", "removal 'left' for a closed subspace"),
            (
                self.closed_subspace and self.loss == "kl",
                "the loss 'refusal' for a closed subspace, as there is no divergence before training",
            ),
            (
                self.each_anchor and (self.scope, self.removal, self.loss) != ("global", "rank1", "refusal"),
                "scope 'global', removal 'rank1' and the loss 'refusal' where each anchor is a constraint",
            ),
        ]
        for is_violated, expected in conditions:
            if is_violated:
                raise SPFError(f"rule '{self.name}': expected {expected}, found {self}")
        if self.largest_weight and not 0 < self.safety_gradient_weight <= self.largest_weight:
            raise SPFError(
                f"rule '{self.name}': expected mix above 0 and largest_mix of at least mix, found "
                f"mix={self.safety_gradient_weight:g} and largest_mix={self.largest_weight:g}; give both, or a rule "
                "whose multiple is fixed ('kl-left', 'mixing') and mix alone"
            )

    def weight_at(self, drift: float) -> float:
        """Return the multiple of g_s that is added to the utility gradient where the safety loss has drifted.

        The multiple is w up to a drift of u = 0.003 nats per token, and beyond that w · drift / u, up to the largest
        weight W. So what is minimised besides the task's loss is w · drift up to u, a quadratic penalty from there
        (Nocedal and Wright 2006, chapter 17), and linear again from u · W / w on.

        Args:
            drift: Excess of the safety loss L_s over its value L_ref before training, nats per token.

        Example:
            >>> rule = Rule("mine", "gradient", "block", "none", safety_gradient_weight=1.0, largest_weight=10.0)
            >>> [rule.weight_at(drift) for drift in (0.0, 0.003, 0.006, 1.0)]
            [1.0, 1.0, 2.0, 10.0]
        """
        grown = self.safety_gradient_weight * max(1.0, drift / _WEIGHT_UNIT)
        return min(grown, max(self.safety_gradient_weight, self.largest_weight))

    @property
    def has_subspace(self) -> bool:
        """Whether the rule removes a subspace."""
        return self.removal in _SUBSPACES

    @property
    def projects_gradient(self) -> bool:
        """Whether the rule removes a part of the utility gradient."""
        return self.level == "gradient" and self.removal != "none"

    @property
    def constrains(self) -> bool:
        """Whether the rule demands ⟨d, g_s⟩ ≤ 0 of a step."""
        # The published rule removes the subspace and does not look at the rest of g_s.
        subspace_only = self.level == "gradient" and self.has_subspace
        return self.removal in {"rank1", "left", "two-sided"} and not self.closed_subspace and not subspace_only

    @property
    def promise(self) -> Promise:
        """The property of every applied update that is checked on the weights.

        ``"every block"``: ⟨Δθ, g_s⟩ ≤ 0 for each block; ``"every anchor"``: the same for each constraint, summed over
        the blocks; ``"subspace"``: the weights do not move inside the subspace; ``"nothing"``: no promise.
        """
        if self.level == "gradient" or not (self.constrains or self.closed_subspace):
            return "nothing"
        if self.closed_subspace:
            return "subspace"
        return "every block" if self.scope == "block" else "every anchor"
