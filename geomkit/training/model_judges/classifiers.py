"""A judge by the labels of a sequence classifier."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.inputs.model_state import model_state_kept
from geomkit.training.judges import Verdict, judge_refusals
from geomkit.utils.progress import slow_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ClassifierJudge:
    """Judge by the most likely label of a sequence classifier.

    Attributes:
        model: A model for sequence classification; its state is restored, on the device where it is.
        tokenizer: Its tokenizer, with a pad token.
        refused: Labels of a refusal; empty where the classifier does not decide refusals.
        harmful: Labels of a harmful response; empty where the classifier does not decide harm.
        pair: Whether the classifier reads the prompt with the response, or the response alone.
        source: Name of the model, for result files.
        batch_size: Responses classified at a time.
        progress: Show a bar, if it takes longer than five seconds.
    """

    model: "PreTrainedModel" = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    refused: tuple[str, ...] = ()
    harmful: tuple[str, ...] = ()
    pair: bool = False
    source: str = ""
    batch_size: int = 16
    progress: bool = True

    def __post_init__(self) -> None:
        """Check that the model has the labels, and that they decide something."""
        known = list(self._names().values())
        if not self.refused and not self.harmful:
            raise DataError(f"expected labels that mean a refusal or harm, found none; the classifier has {known}")
        for label in (*self.refused, *self.harmful):
            if label not in known:
                raise DataError(f"expected labels of the classifier, {known}, found '{label}'")
        if self.tokenizer.pad_token_id is None:
            raise DataError(
                "expected a classifier whose tokenizer has a pad token, found none on "
                f"'{self.tokenizer.name_or_path}'; set "
                "tokenizer.pad_token of the judge, and save it in the judge's folder"
            )

    @property
    def name(self) -> str:
        """Names of the labels and of the model."""
        labels = [f"{field}:{','.join(getattr(self, field))}" for field in self.decides]
        return f"{' '.join(labels)}={self.source or type(self.model).__name__}"

    @property
    def decides(self) -> tuple[str, ...]:
        """Fields of a verdict that the labels decide."""
        return tuple(name for name in ("refused", "harmful") if getattr(self, name))

    @property
    def labels(self) -> tuple[str, ...]:
        """No labels: the shares of the decided fields are enough."""
        return ()

    def __call__(self, prompt: str, response: str) -> bool:
        """Return whether a response is a refusal."""
        return judge_refusals(self, [prompt], [response])[0]

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each response, and log how many texts were too long for the classifier and cut."""
        labels: list[str] = []
        cut = 0
        hidden_bar = slow_bar(len(responses), "judge", "response", self.progress)
        with model_state_kept(self.model), hidden_bar as bar:
            self.model.eval()
            for start in range(0, len(responses), self.batch_size):
                batch = slice(start, start + self.batch_size)
                names, longer = self._classify(prompts[batch], responses[batch])
                labels += names
                cut += longer
                bar.update(len(names))
        if cut:
            _LOG.warning(
                "judge '%s': %d of %d texts were cut to %d tokens", self.name, cut, len(labels), self._longest()
            )
        return [self._verdict(label) for label in labels]

    def _classify(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[str], int]:
        """Return the label of each response, and how many texts were cut."""
        import torch

        texts = (list(prompts), list(responses)) if self.pair else (list(responses),)
        whole = self.tokenizer(*texts)["input_ids"]
        encoded = self.tokenizer(
            *texts, padding=True, truncation=True, max_length=self._longest(), return_tensors="pt"
        ).to(self.model.device)
        with torch.no_grad():
            chosen = self.model(**encoded).logits.argmax(dim=-1).tolist()
        names = self._names()
        return [names[index] for index in chosen], sum(len(ids) > self._longest() for ids in whole)

    def _longest(self) -> int:
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        return min(int(positions), int(self.tokenizer.model_max_length))

    def _names(self) -> dict[int, str]:
        return {int(index): str(name) for index, name in self.model.config.id2label.items()}

    def _verdict(self, label: str) -> Verdict:
        return Verdict(
            refused=label in self.refused if self.refused else None,
            harmful=label in self.harmful if self.harmful else None,
            label=label,
        )


def load_classifier(
    source: str | Path, *, device: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return a sequence classifier and its tokenizer, from a folder or the hub.

    Args:
        source: A folder, or the id of a model on the hub.
        device: Device of the model; when left out, a GPU if there is one, else the CPU.

    Raises:
        DataError: If there is no such model, or its weights have no head for classification.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        # Without a false trust_remote_code, transformers asks on stdin whether to run code of the folder.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # configuration, weights and hub client raise different exception types
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(
            f"expected a sequence classifier at '{source}', found {type(error).__name__}: {reason}; check the name "
            "and the network, or give another model"
        ) from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise DataError(
            f"expected a trained classifier at '{source}', found no weights for {missing}; take another model"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
