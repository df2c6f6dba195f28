"""The model card of a fine-tune: what was trained, what was protected and how, and what that does not promise."""

import re
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomkit.spf.certificate import Certificate
from geomkit.spf.rule import Rule, SafetyLoss
from geomkit.spf.settings import SPF
from geomkit.spf.step_record import LOG_NAME
from geomkit.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

_NO_PROMISE = """
- The constraint is on the anchors and to first order. Requests unlike every anchor, answers that have begun otherwise,
  jailbreaks and long or strong training can still get through, or the model refuses too much.
- Nothing is promised after the last step: another fine-tune, a merge or a quantisation is not covered.
- This card has no evaluation. `geomkit evaluate` measures refusals, over-refusals and skills.
"""

_LOSSES: Mapping[SafetyLoss, str] = {
    "refusal": "cross-entropy of their answers", "kl": "divergence from the model before training",
}  # fmt: skip


def settings_of(
    training: Mapping[str, Any], rows: int, spf: SPF | None, model: "PreTrainedModel"
) -> dict[str, dict[str, object]]:
    """Return what the card says of a fine-tune's settings: ``"training"``, and under SPF ``"protection"``.

    Args:
        training: Training arguments by name.
        rows: Number of training examples.
        spf: The settings of SPF, with encoded examples.
        model: The model before training.
    """
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    told = {name: value for name, value in training.items() if isinstance(value, str | int | float)}
    facts: dict[str, object] = {
        "base model": _hub_name(model) or type(model).__name__,
        "trained parameters": f"{trained:,} of {sum(weight.numel() for weight in weights):,}",
        "training examples": rows,
    }
    if spf is None:
        return {"training": facts | told}
    rule = spf.checked_rule()
    anchors, fence = str(_count(spf.anchors)), "none"
    if spf.benign is not None and rule.loss == "kl":
        anchors += f" with refusals and {_count(spf.benign)} benign ones"
    elif spf.benign is not None:
        fence = f"{spf.benign_per_step} drawn for each step from {_count(spf.benign)}"
    return {
        "training": facts | told,
        "protection": {
            "rule": rule.name,
            "what the rule is": rule.source,
            "a step in conflict becomes": rule.formula or "unchanged",
            "promise": rule.promise_text,
            "loss on the anchors": _LOSSES[rule.loss],
            "multiple of its gradient that is added": _multiple(rule),
            "anchors": f"{spf.anchors_per_step} drawn for each step from {anchors}",
            "steps between two safety gradients": spf.refresh_every,
            "benign fence": fence,
            "seed of the draws": spf.seed,
        },
    }


def _multiple(rule: Rule) -> str:
    """Return the multiple of the safety gradient that a rule adds, in words."""
    multiple = f"{rule.safety_gradient_weight:g}"
    grows = rule.largest_weight > rule.safety_gradient_weight
    return f"{multiple}, up to {rule.largest_weight:g} with the drift" if grows else multiple


def _count(examples: "Sized | str | Path") -> int:
    """Return the number of examples, which a fine-tune has loaded."""
    return 0 if isinstance(examples, str | Path) else len(examples)


def model_card(
    model: "PreTrainedModel",
    settings: Mapping[str, Mapping[str, object]],
    history: "pd.DataFrame",
    certificate: Certificate | None,
    *,
    interrupted: bool = False,
) -> str:
    """Return the model card of a fine-tune as Markdown, with the header that the hub reads.

    Args:
        model: The trained model.
        settings: What :func:`settings_of` returned.
        history: The logged steps.
        certificate: The certificate; ``None`` without SPF.
        interrupted: Whether the run was interrupted.
    """
    from huggingface_hub import ModelCardData

    adapter = hasattr(model, "peft_config")
    header = ModelCardData(
        base_model=_hub_name(model),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["geomkit", *(["spf", "safety"] if certificate else [])],
    )
    parts = _parts(settings, history, certificate, interrupted=interrupted)
    return "\n\n".join([f"---\n{header.to_yaml()}\n---", "# A fine-tuned model", *parts]) + "\n"


def _parts(
    settings: Mapping[str, Mapping[str, object]],
    history: "pd.DataFrame",
    certificate: Certificate | None,
    *,
    interrupted: bool,
) -> Iterator[str]:
    end = " It was interrupted: this is what was trained until then." if interrupted else ""
    yield f"Trained by geomkit {__version__}, which also wrote this card.{end}"
    yield "## Training"
    losses = (
        {f"loss at step {row['step']:.0f}": f"{row['loss']:.4g}" for _, row in history.iloc[[0, -1]].iterrows()}
        if len(history)
        else {}
    )
    yield _table({**settings.get("training", {}), **losses})
    yield "## Protection"
    if certificate is None:
        yield "None: this was a plain fine-tune, after which a model may have lost refusals of its base model."
        return
    yield (
        "Safety-preserving fine-tuning ([SPF](https://arxiv.org/abs/2601.10141)) on anchors, which are requests "
        "with the answers that should stay. Its rule says what becomes of a step that would raise the loss "
        "on the anchors."
    )
    yield _table(settings.get("protection", {}))
    yield "## Certificate"
    yield f"Measured on the weights before and after each step; `{LOG_NAME}` has a record of every step."
    yield f"{str(certificate)[0].upper()}{str(certificate)[1:]}."
    yield "## What this does not promise"
    yield _NO_PROMISE.strip()


def _table(facts: Mapping[str, object]) -> str:
    rows = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items())
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _hub_name(model: "PreTrainedModel") -> str | None:
    """Return the hub id that a model was loaded from; ``None`` if it was a folder, which is nobody else's concern."""
    name = str(getattr(model, "name_or_path", "") or model.config.name_or_path)
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None
