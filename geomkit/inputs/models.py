"""Loading a causal language model with its tokenizer, and making an untrained model of the same architecture."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.utils.arguments import type_in_words
from geomkit.utils.files import data_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    source: str | Path, *, dtype: str = "auto", device: str | None = None, pad_token: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return a causal language model and its tokenizer, from a folder, from the hub, or from the shipped test model.

    Args:
        source: A folder, the id of a model on the hub, or a stage of the shipped model, the "organism":
            ``"organism/base"`` before and ``"organism/aligned"`` after safety training.
        dtype: ``"auto"`` for the dtype of the checkpoint, or the name of a torch dtype such as ``"float32"``.
        device: Device of the model; when left out, a GPU if there is one, else the CPU.
        pad_token: Token that fills short rows, for tokenizers without a pad token.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        DataError: If model or tokenizer cannot be loaded, or the pad token is not in the vocabulary.

    Example:
        >>> model, tokenizer = load_model("organism/base")
        >>> type(model).__name__
        'LlamaForCausalLM'
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(source)
    if name.startswith("organism/") and (data_dir() / name).is_dir():
        name = str(data_dir() / name)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise DataError(f"expected a folder with a causal language model at {name}, found none; check the path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # configuration, weights and hub client raise different exception types
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(
            f"expected a causal language model at '{source}' (a folder, a hub id, organism/aligned or organism/base), "
            f"found {type(error).__name__}: {reason}"
        ) from None
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise DataError(
                f"expected a pad token from the vocabulary of '{source}', found '{pad_token}'; give another one"
            )
        tokenizer.pad_token = pad_token
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(target).eval(), tokenizer


def untrained(model: "PreTrainedModel", *, seed: int = 0) -> "PreTrainedModel":
    """Return an untrained model of the same architecture, with random weights: a negative control for every measure.

    Properties of its gradients come from the architecture, the texts and the tokens, not from training.

    Args:
        model: A causal language model; only its configuration, dtype and device are used.
        seed: Seed of the weights, which are drawn as transformers initialises this architecture.

    Returns:
        The new model in eval mode, with the same dtype and device. Global random states are restored.

    Raises:
        DataError: If ``model`` is not a transformers model, or has adapters.

    Example:
        >>> import geomkit as gk
        >>> model = untrained(gk.load_organism()[0])
        >>> sum(weight.numel() for weight in model.parameters())
        853120
    """
    import torch
    from transformers import AutoModelForCausalLM

    if hasattr(model, "get_base_model"):  # as models of PEFT have
        raise DataError(
            f"expected a model without adapters, found {type(model).__name__}; pass model.get_base_model(), and give "
            "what comes out the same adapters if they are part of the question"
        )
    if not hasattr(model, "config") or not hasattr(model, "device"):
        raise DataError(f"expected a transformers model, found {type_in_words(model)}; load it with geomkit.load_model")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype)
    return fresh.to(model.device).eval()
