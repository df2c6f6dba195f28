"""The settings of an SPF run: the anchors, the rule, and how the guard works."""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from geomkit.errors import SPFError
from geomkit.inputs.examples import load_examples
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.parameters import warn_of_lost_updates
from geomkit.inputs.tokens import EncodedExamples, encode
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.checkpoint_state import load_state
from geomkit.spf.constraints import BenignFence, ConstraintMeter
from geomkit.spf.guard import Guard, Options
from geomkit.spf.guard_group import GuardGroup
from geomkit.spf.rule import PROSE, Rule, SafetyLoss
from geomkit.spf.rules import DEFAULT_RULE, get_rule
from geomkit.spf.weights.guarded import Guarded
from geomkit.spf.weights.trained import warn_of_rounding, warn_of_unguarded
from geomkit.utils.arguments import as_python
from geomkit.utils.options import check_options

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FLAGS = ("drift_correction", "master_weights", "measure_curvature")


@dataclass(frozen=True, eq=False)
class SPF:
    """Settings of safety-preserving fine-tuning (arXiv 2601.10141, and geomkit's own rules).

    Attributes:
        anchors: Safety examples, each a forbidden request with its refusal, or the path or name under which
            :func:`geomkit.load_examples` finds them; the model's own refusals are the safe choice, see
            :func:`geomkit.own_refusals`.
        rule: A name in :data:`geomkit.spf.rules.RULES`, or a rule; :func:`geomkit.spf.rules.rules` says when to choose
            each rule. ``"adaptive-kl-left"`` keeps the model's answers to the anchors what they were; ``"mixed-left"``
            teaches it the anchors' refusals; ``"rank1"`` is the cheapest rule that only removes the conflict with the
            anchors.
        rank: Rank k for a rule that removes a subspace; ``None`` for the rule's own rank.
        drift_correction: Whether to undo, to first order, the increase of the safety loss that earlier steps caused
            through curvature; ``None`` for the rule's own setting.
        loss: The safety loss on the anchors. ``"refusal"``: the cross-entropy of their answers, which training can
            lower further and further, so that the model may come to refuse benign requests too. ``"kl"``: the
            divergence from the model before training, KL(before ‖ now), on the tokens of their answers, so that anchors
            may be *any* examples on which the model has to stay what it is: forbidden requests with the model's own
            refusals, and benign requests with its own answers. ``None`` for the rule's own loss. The default rule
            is made for ``"kl"``; ``rule="mixed-left"`` is its counterpart for ``"refusal"``.
        mix: Multiple of the safety gradient that is added to the task's gradient before the optimizer's step, in
            addition to the rule, so that the model learns the task and the anchors; ``None`` for the rule's own
            multiple, which is 0 for most rules. Where the multiple grows, as under the default rule, it is the
            smallest, and at most the largest; a fixed multiple is that of ``rule="kl-left"``.
        largest_mix: Largest multiple of the safety gradient, for a rule whose multiple is above 0: where the anchors'
            loss is more than 0.003 nats per token above its value before training, the multiple grows with that
            difference (:meth:`~geomkit.spf.rule.Rule.weight_at`), so that harmful data meet a large multiple and a
            harmless task a small one. It suits the KL loss: a cross-entropy that training has lowered may rise again to
            its first value before the multiple grows. ``None`` for the rule's own largest multiple: 10 for the default
            rule, while the multiple of the other rules is fixed.
        drift_margin: Excess of the anchors' loss over its value before training above which drift is corrected, nats
            per token; ``None`` for the rule's own margin.
        anchors_per_step: Number of anchors that each step draws from the pool.
        benign: Requests that the model has to keep answering, with the answers, best the model's own (see
            :func:`geomkit.training.responses.own_responses`); best are requests that resemble forbidden ones. Under a
            rule with the KL loss they are anchors too: ``anchors_per_step`` examples are drawn from both sets together,
            so that their sizes set the mixture. Under the other rules they are the benign fence: where their loss
            exceeds its value before training by more than ``benign_margin``, the update must bring it back, to first
            order and without a conflict with safety.
        benign_per_step: Number of benign examples that each step draws for the fence.
        benign_margin: Tolerated excess of the benign examples' loss over its value before training, nats per token.
        correction_limit: Largest correction for drift and the benign fence, as a fraction of the norm of the update.
        refresh_every: Number of steps from one measurement of the safety gradient to the next.
        refresh_energy: Recompute a subspace only when the fraction of ‖g_s‖² inside it is less than this multiple of
            the fraction when the subspace was computed; ``None`` recomputes it at every measurement.
        master_weights: Whether to store weights of fewer bits also in fp32 (4 bytes per parameter). The fp32 weights
            satisfy the constraint exactly; the model's weights are the fp32 weights, rounded once.
        measure_curvature: Whether to run the anchors once more after each step, to measure the change of the safety
            loss beyond first order. Where every step has the same anchors, this change is known without another run.
        log: File to which each step appends its record, a line of JSON.
        tokenizer: The model's tokenizer; :func:`geomkit.finetune` and the Trainer pass theirs.
        seed: Seed of the draws of anchors and of random directions.

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
    loss: SafetyLoss | None = None
    mix: float | None = None
    largest_mix: float | None = None
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

    def __post_init__(self) -> None:
        """Make Python's numbers of those of numpy and torch, which checkpoints could not store."""
        for entry in fields(self):
            object.__setattr__(self, entry.name, as_python(getattr(self, entry.name)))

    @overload
    def attach(
        self,
        model: "PreTrainedModel",
        optimizer: torch.optim.Optimizer,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        resume: str | Path | None = None,
        progress: bool = True,
    ) -> Guard: ...

    @overload
    def attach(
        self,
        model: "PreTrainedModel",
        optimizer: Sequence[torch.optim.Optimizer],
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        resume: None = None,
        progress: bool = True,
    ) -> GuardGroup: ...

    def attach(
        self,
        model: "PreTrainedModel",
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        resume: str | Path | None = None,
        progress: bool = True,
    ) -> Guard | GuardGroup:
        """Attach SPF to an optimizer; from then on, every step of the optimizer is projected.

        Args:
            model: The model that is trained.
            optimizer: The model's optimizer, plain or wrapped by accelerate; or a list of all its optimizers, such as
                Muon for matrices and AdamW for the rest.
            tokenizer: The model's tokenizer; the tokenizer in the settings if left out.
            resume: The checkpoint from which training is resumed, into which :meth:`Guard.save` has written; for one
                optimizer only.
            progress: Show a bar while anchors and benign examples are encoded and their losses before training are
                measured, if that takes longer than five seconds.

        Returns:
            A :class:`Guard`, which holds the certificate; as a context manager it ends the projection with the block.
            For a list of optimizers a :class:`~geomkit.spf.guard_group.GuardGroup`, with the same methods but ``save``.

        Raises:
            SPFError: If there is no tokenizer, the rule is unknown, the optimizer holds parameters that are not the
                model's or is DeepSpeed's, weights are sharded in an unsupported way, parameters share memory, adapters
                cannot keep the rule, or there is nothing to resume; for several optimizers also if there is a ``log``.
            DataError: If the anchors cannot be encoded, or do not fit the model's embedding or positions.
        """
        if not isinstance(optimizer, list | tuple):
            guard = self._attach_one(model, optimizer, tokenizer, resume, progress)
            warn_of_unguarded(guard.guarded.model, guard.guarded.parameters)
            return guard
        if not optimizer:
            raise SPFError("expected an optimizer, found an empty list; give the optimizers of the model")
        if resume or self.log:
            raise SPFError(
                f"expected log= and resume= with one optimizer only, found a list of {len(optimizer)}, log={self.log} "
                f"and resume={resume}; give the optimizer itself, or leave log= and resume= out"
            )
        guards: list[Guard] = []
        try:
            guards.extend(self._attach_one(model, one, tokenizer, None, progress) for one in optimizer)
        except BaseException:
            GuardGroup(guards).release()
            raise
        held = {name: weight for guard in guards for name, weight in guard.guarded.parameters.items()}
        warn_of_unguarded(guards[0].guarded.model, held)
        return GuardGroup(guards)

    def _attach_one(
        self,
        model: "PreTrainedModel",
        optimizer: Any,
        tokenizer: "PreTrainedTokenizerBase | None",
        resume: str | Path | None,
        progress: bool,
    ) -> Guard:
        """Return the guard of one optimizer; see :meth:`attach`."""
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise SPFError("expected a tokenizer for the anchors, found none; pass SPF(anchors, tokenizer=…)")
        rule = self.checked_rule()
        pool, pad = self._pool(model, self.anchors, self.anchors_per_step, tokenizer, progress)
        fence = None
        if self.benign is not None and rule.loss == "kl":
            benign, _ = self._pool(model, self.benign, self.anchors_per_step, tokenizer, progress)
            pool = replace(pool, rows=pool.rows + benign.rows)
        elif self.benign is not None:
            benign, _ = self._pool(model, self.benign, self.benign_per_step, tokenizer, progress)
            fence = BenignFence(benign, self.benign_margin)
        guarded = Guarded(model, optimizer, rule.level, master=self.master_weights)
        if rule.closed_subspace and not resume:
            guarded.refuse_open_products(rule.name)
        warn_of_lost_updates(guarded.parameters)
        warn_of_rounding(guarded.without_masters())
        with guarded.collecting():
            constraint_meter = ConstraintMeter(guarded.model, rule, pool, pad, fence, self.correction_limit, progress)
        options = Options(
            refresh_every=self.refresh_every,
            refresh_energy=self.refresh_energy,
            measure_curvature=self.measure_curvature,
            log=Path(self.log) if self.log else None,
            seed=self.seed,
        )
        description = self.describe()
        state = load_state(Path(resume), description) if resume else None
        return Guard(guarded, rule, constraint_meter, options, state, description)

    def describe(self) -> dict[str, object]:
        """Return the settings that the numbers of a run depend on, with hashes in place of the examples."""
        settings = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in {"tokenizer", "log"}
        }
        hashes = {name: _content_hash(settings[name]) for name in ("anchors", "benign") if settings[name] is not None}
        rule = {name: value for name, value in asdict(self.checked_rule()).items() if name not in PROSE}
        return settings | hashes | {"rule": rule}

    def checked_rule(self) -> Rule:
        """Return the rule with this object's overrides (rank, drift correction, drift margin, mixes, loss) applied.

        Raises:
            SPFError: If the rule is unknown, does not fit the settings, or a number is out of its range.
        """
        self._refuse_other_types()
        check_options(vars(self) | {"anchors": None}, error=SPFError)  # in a grid, `anchors` is a number
        rule = get_rule(
            self.rule,
            self.rank,
            drift_correction=self.drift_correction,
            drift_margin=self.drift_margin,
            mix=self.mix,
            largest_mix=self.largest_mix,
            loss=self.loss,
        )
        if self.refresh_energy is not None and not rule.has_subspace:
            raise SPFError(
                f"expected refresh_energy for a rule that removes a subspace only, found {self.refresh_energy} and "
                f"'{rule.name}'; leave it out"
            )
        fence = {name: getattr(self, name) for name in ("benign_per_step", "benign_margin")}
        if rule.loss == "kl" and self.benign is not None and fence != {name: getattr(SPF, name) for name in fence}:
            raise SPFError(
                f"expected benign_per_step and benign_margin for a rule with a benign fence only, found {fence} and "
                f"'{rule.name}', for which benign examples are anchors; give anchors_per_step"
            )
        return rule

    def _refuse_other_types(self) -> None:
        """Refuse ``None`` for what has another default, and flags that are neither true nor false."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.default is MISSING:
                raise SPFError(f"expected {entry.name}, found None; give examples to protect")
            if value is None and entry.default is not None:
                raise SPFError(f"expected {entry.name}= with a value, found None; leave it out for the default")
            if entry.name in _FLAGS and not isinstance(value, bool | None):
                raise SPFError(f"expected {entry.name} to be True or False, found {value!r:.40}; give one of these")

    def encoded_like(self, rows: EncodedExamples, progress: bool = False) -> "SPF":
        """Return the settings with anchors and benign examples encoded like ``rows``; encoded examples stay as is.

        Args:
            rows: The encoded examples.
            progress: Show bars, if reading or encoding takes longer than five seconds.
        """

        def encoded(examples: "Dataset | EncodedExamples | str | Path") -> EncodedExamples:
            if isinstance(examples, EncodedExamples):
                return examples
            loaded = load_examples(examples, progress=progress)
            return encode(rows.tokenizer, loaded, assistant_mask=rows.assistant_mask, progress=progress)

        return replace(
            self, anchors=encoded(self.anchors), benign=None if self.benign is None else encoded(self.benign)
        )

    def _pool(
        self,
        model: "PreTrainedModel",
        examples: "Dataset | EncodedExamples | str | Path",
        per_step: int,
        tokenizer: "PreTrainedTokenizerBase",
        progress: bool,
    ) -> tuple[AnchorPool, int]:
        """Return a pool of examples that the model can run, and the id of the token that fills short rows."""
        if not isinstance(examples, EncodedExamples):
            examples = load_examples(examples, progress=progress)
        rows, pad = encoded_for(model, tokenizer, examples, progress)
        return AnchorPool(tuple(rows), per_step, self.seed), pad


def _content_hash(examples: "Dataset | EncodedExamples | str | Path") -> str:
    """Return a hash of the text of examples; for encoded examples, of their text and tokens."""
    if isinstance(examples, EncodedExamples):
        return examples.fingerprint
    loaded = load_examples(examples, progress=False)
    return sha256(repr(loaded["messages"][:]).encode()).hexdigest()
