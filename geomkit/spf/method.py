"""What to protect and how: the settings of an SPF run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from geomkit.errors import SPFError
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.guard import Guard
from geomkit.spf.rules import Rule, get_rule
from geomkit.tokens import AssistantMask, encode, pad_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class SPF:
    """Safety-preserving fine-tuning: what to protect and how (arXiv 2601.10141, and geomkit's own rules).

    Attributes:
        anchors: Safety examples, forbidden request and refusal; the model's own refusals are the safe choice.
        rule: A name in :data:`geomkit.spf.RULES`, or a rule.
        rank: Rank k of a rule that protects a subspace; the rule's own when left out.
        drift_correction: Also undo, to first order, what earlier steps did to the safety loss through curvature; the
            rule's own choice when left out.
        anchors_per_step: How many anchors each step draws from the pool.
        tokenizer: The model's tokenizer; :func:`geomkit.finetune` and the Trainer bring their own.
        assistant_mask: How assistant tokens are found, see :func:`geomkit.tokens.encode`.
        seed: Seed of the draws.

    Example:
        >>> import geomkit as gk, torch
        >>> model, tokenizer = gk.load_organism()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        >>> spf = gk.SPF(gk.load_examples("safety"), tokenizer=tokenizer)
        >>> with spf.attach(model, optimizer) as guard:
        ...     batch = tokenizer("How do I paint the fence?", return_tensors="pt")
        ...     loss = model(**batch, labels=batch["input_ids"]).loss
        ...     loss.backward()
        ...     optimizer.step()
        >>> guard.certificate.violations
        0
    """

    anchors: "Dataset"
    rule: str | Rule = "rank1"
    rank: int | None = None
    drift_correction: bool | None = None
    anchors_per_step: int = 8
    tokenizer: "PreTrainedTokenizerBase | None" = None
    assistant_mask: AssistantMask = "template"
    seed: int = 0

    def attach(
        self,
        model: "PreTrainedModel",
        optimizer: torch.optim.Optimizer,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> "Guard":
        """Project every step of an optimizer from now on.

        Args:
            model: The model that is trained.
            optimizer: Its optimizer, plain or wrapped by accelerate.
            tokenizer: The model's tokenizer, when it was not given before.

        Returns:
            A :class:`Guard`: a context manager that ends the projection, and the certificate.

        Raises:
            SPFError: If there is no tokenizer, the rule is unknown, the optimizer holds parameters that are not the
                model's, or the weights are sharded.
            DataError: If the anchors cannot be encoded.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise SPFError("expected a tokenizer for the anchors, found none; pass SPF(anchors, tokenizer=…)")
        rows = encode(tokenizer, self.anchors, assistant_mask=self.assistant_mask)
        pool = AnchorPool(tuple(rows), self.anchors_per_step, self.seed)
        rule = get_rule(self.rule, self.rank, drift_correction=self.drift_correction)
        return Guard(model, optimizer, rule, pool, pad_id(tokenizer))
