"""What to protect and how: the settings of an SPF run."""

from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from geomkit.errors import SPFError
from geomkit.inputs.examples import load_examples
from geomkit.inputs.tokens import EncodedExamples, as_encoded, encode, pad_id
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.checkpoint_state import load_state
from geomkit.spf.constraints import BenignFence, ConstraintMeter
from geomkit.spf.guard import Guard, Options
from geomkit.spf.rules import DEFAULT_RULE, Rule, get_rule
from geomkit.spf.weights.guarded import Guarded, warn_of_rounding

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class SPF:
    """Safety-preserving fine-tuning: what to protect and how (arXiv 2601.10141, and geomkit's own rules).

    Attributes:
        anchors: Safety examples, forbidden request and refusal, or where :func:`geomkit.load_examples` finds them; the
            model's own refusals are the safe choice, see :func:`geomkit.own_refusals`.
        rule: A name in :data:`geomkit.spf.rules.RULES`, or a rule. ``"mixed-left"`` also learns the anchors;
            ``"rank1"`` is the cheapest that only removes what conflicts with them.
        rank: Rank k of a rule that protects a subspace; the rule's own when left out.
        drift_correction: Also undo, to first order, what earlier steps did to the safety loss through curvature; the
            rule's own choice when left out.
        mix: Multiple of the safety gradient that is added to the task's before the optimizer takes its step, so that
            both are learnt, beside what the rule then does; the rule's own, mostly 0, when left out.
        drift_margin: How far the anchors' loss may exceed that before training until drift is corrected, nats per
            token; the rule's own when left out.
        anchors_per_step: How many anchors each step draws from the pool.
        benign: The benign fence: requests that the model should go on to answer, with the answers. Where their loss
            exceeds that before training by more than ``benign_margin``, the update must bring it back, to first order
            and without a conflict with safety.
        benign_per_step: How many of these each step draws.
        benign_margin: Nats per token.
        correction_limit: The most that is added for drift and the fence, as a share of the norm of the update.
        refresh_every: Measure the safety gradient every so many steps, and keep it in between.
        refresh_energy: Measure it, but compute subspaces anew only when they hold less than this share of the part of
            ‖g_s‖² that they held at first; at every measurement when left out.
        master_weights: Keep weights below fp32 in fp32 beside (4 bytes per parameter), where the constraint is kept
            exactly; the weights themselves are these, rounded once.
        measure_curvature: Run the anchors once more after each step, to tell what of the drift is beyond first order;
            where the anchors are the same at every step that is known anyway.
        log: Where to write the certificate as it comes, a line of JSON per step.
        tokenizer: The model's tokenizer; :func:`geomkit.finetune` and the Trainer bring their own.
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

    anchors: "Dataset | EncodedExamples | str | Path"
    rule: str | Rule = DEFAULT_RULE
    rank: int | None = None
    drift_correction: bool | None = None
    mix: float | None = None
    drift_margin: float | None = None
    anchors_per_step: int = 8
    benign: "Dataset | EncodedExamples | str | Path | None" = None
    benign_per_step: int = 8
    benign_margin: float = 0.02
    correction_limit: float = 0.5
    refresh_every: int = 1
    refresh_energy: float | None = None
    master_weights: bool = False
    measure_curvature: bool = False
    log: str | Path | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    seed: int = 0

    def attach(
        self,
        model: "PreTrainedModel",
        optimizer: torch.optim.Optimizer,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        resume: str | Path | None = None,
    ) -> "Guard":
        """Project every step of an optimizer from now on.

        Args:
            model: The model that is trained.
            optimizer: Its optimizer, plain or wrapped by accelerate.
            tokenizer: The model's tokenizer, when it was not given before.
            resume: The checkpoint that training goes on from, where :meth:`Guard.save` has written.

        Returns:
            A :class:`Guard`: a context manager that ends the projection, and the certificate.

        Raises:
            SPFError: If there is no tokenizer, the rule is unknown, the optimizer holds parameters that are not the
                model's or is DeepSpeed's, weights are sharded in a way that cannot be seen, or there is nothing to
                resume.
            DataError: If the anchors cannot be encoded.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise SPFError("expected a tokenizer for the anchors, found none; pass SPF(anchors, tokenizer=…)")
        rule = self.checked_rule()
        pool = self._pool(self.anchors, self.anchors_per_step, tokenizer)
        fence = None
        if self.benign is not None:
            fence = BenignFence(self._pool(self.benign, self.benign_per_step, tokenizer), self.benign_margin)
        guarded = Guarded(model, optimizer, rule.level, master=self.master_weights)
        warn_of_rounding(guarded.without_masters())
        with guarded.collecting():
            meter = ConstraintMeter(guarded.model, rule, pool, pad_id(tokenizer), fence, self.correction_limit)
        options = Options(
            refresh_every=self.refresh_every,
            refresh_energy=self.refresh_energy,
            measure_curvature=self.measure_curvature,
            log=Path(self.log) if self.log else None,
            seed=self.seed,
        )
        description = self.describe()
        state = load_state(Path(resume), description) if resume else None
        return Guard(guarded, optimizer, rule, meter, options, state, description)

    def describe(self) -> dict[str, object]:
        """Return what a run under this depends on, the anchors by their text's hash."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in {"tokenizer", "log"}}
        hashes = {name: _content_hash(own[name]) for name in ("anchors", "benign") if own[name] is not None}
        return own | hashes | {"rule": asdict(self.checked_rule())}

    def checked_rule(self) -> Rule:
        """Return the rule with what is said of it here.

        Raises:
            SPFError: If there is no such rule, or it does not go with the settings.
        """
        rule = get_rule(
            self.rule,
            self.rank,
            drift_correction=self.drift_correction,
            drift_margin=self.drift_margin,
            mix=self.mix,
        )
        if self.refresh_every < 1 or self.correction_limit <= 0:
            raise SPFError(
                f"expected refresh_every ≥ 1 and correction_limit > 0, found {self.refresh_every} and "
                f"{self.correction_limit}"
            )
        if self.refresh_energy is not None and not (rule.has_subspace and 0 < self.refresh_energy <= 1):
            raise SPFError(
                f"expected refresh_energy between 0 and 1 and a rule that removes a subspace, found "
                f"{self.refresh_energy} and '{rule.name}'; leave it out"
            )
        return rule

    def encoded_like(self, rows: EncodedExamples) -> "SPF":
        """Return these settings with anchors and benign examples encoded as other rows are, unless they are already."""

        def encoded(examples: "Dataset | EncodedExamples | str | Path") -> EncodedExamples:
            if isinstance(examples, EncodedExamples):
                return examples
            return encode(rows.tokenizer, load_examples(examples), assistant_mask=rows.assistant_mask)

        return replace(
            self, anchors=encoded(self.anchors), benign=None if self.benign is None else encoded(self.benign)
        )

    def _pool(
        self, examples: "Dataset | EncodedExamples | str | Path", per_step: int, tokenizer: "PreTrainedTokenizerBase"
    ) -> AnchorPool:
        rows = examples if isinstance(examples, EncodedExamples) else load_examples(examples)
        return AnchorPool(tuple(as_encoded(tokenizer, rows)), per_step, self.seed)


def _content_hash(examples: "Dataset | EncodedExamples | str | Path") -> str:
    """Return a hash of what examples say, and of their tokens where they are encoded."""
    if isinstance(examples, EncodedExamples):
        return examples.fingerprint
    return sha256(repr(load_examples(examples)["messages"][:]).encode()).hexdigest()
