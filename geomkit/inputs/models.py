"""Loading a causal language model with its tokenizer, and making an untrained model of the same architecture."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.inputs.loading_report import refuse_wrong_weights
from geomkit.utils.arguments import type_in_words
from geomkit.utils.files import data_dir, reading
from geomkit.utils.options import check_option, check_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GGUF = ".gguf"
_KINDS = "a folder, a hub id, a GGUF file, a PEFT adapter, organism/aligned or organism/base"


@dataclass(frozen=True)
class _Source:
    """Where a model is.

    Attributes:
        name: What the user gave, for messages.
        place: Folder, or id on the hub.
        file: Name of the GGUF file in the place; ``None`` for a checkpoint of transformers.
        revision: Branch, tag or commit on the hub.
    """

    name: str
    place: str
    file: str | None = None
    revision: str | None = None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``from_pretrained`` that belong to the source."""
        # Without a false trust_remote_code, transformers asks on stdin whether to run code of the folder.
        given = {"gguf_file": self.file, "revision": self.revision}
        return {"trust_remote_code": False} | {name: value for name, value in given.items() if value is not None}


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    device_map: "str | dict[str, Any] | None" = None,
    revision: str | None = None,
    pad_token: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return a causal language model and its tokenizer, from a folder, from the hub, or from the shipped test model.

    Args:
        source: A folder, the id of a model on the hub, a ``.gguf`` file (a path, or ``owner/name/file.gguf`` on the
            hub), which is dequantised, a folder or id of a PEFT adapter, whose base model is loaded first, or a stage
            of the shipped model, the "organism": ``"organism/base"`` before and ``"organism/aligned"`` after safety
            training. A GGUF file needs the extra ``geomkit[gguf]``, an adapter ``geomkit[lora]``.
        dtype: ``"auto"`` for the dtype of the checkpoint (float32 for a GGUF file), or the name of a torch dtype such
            as ``"float32"``.
        device: Device of the model; when left out, a GPU if there is one, else the CPU.
        device_map: Devices of the model's parts, as in transformers (``"auto"`` fills one device after the other),
            instead of ``device``. Offloaded parts work for evaluation; a collection loads them while it runs.
        revision: Branch, tag or commit of a model on the hub.
        pad_token: Token that fills short rows, for tokenizers without a pad token.

    Returns:
        The model in eval mode, and the tokenizer. The weights of an adapter are trainable, and those of its base model
        are not.

    Raises:
        DataError: If model or tokenizer cannot be loaded; if weights are missing in the checkpoint, unknown to the
            model or of another shape; if the device is not available, or the pad token is not in the vocabulary.

    Example:
        >>> model, tokenizer = load_model("organism/base")
        >>> type(model).__name__
        'LlamaForCausalLM'
    """
    if device is not None and device_map is not None:
        raise DataError(f"expected device= or device_map=, found both ({device}, {device_map}); leave one out")
    target = None if device_map is not None else _device(device)
    with reading(source):
        origin = _located(str(source), revision)
        adapter = _adapter_base(origin)
    base = origin if adapter is None else _located(adapter, None)
    tokenizer = _load_tokenizer(origin, base)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise DataError(
                f"expected a pad token from the vocabulary of '{source}', found '{pad_token}'; give another one"
            )
        tokenizer.pad_token = pad_token
    model = _load_weights(base, dtype, device_map)
    if target is not None:
        model = model.to(target)
    if adapter is not None:
        model = with_saved_adapter(model, origin.place, revision=origin.revision)
    return model.eval(), tokenizer


def _located(name: str, revision: str | None) -> _Source:
    """Return where a model is, after checks that need neither the hub nor the weights.

    Raises:
        DataError: If the name is a path at which there is nothing, or a revision is given for a folder or file.
    """
    place = str(Path(name).expanduser()) if name.startswith("~") else name
    if name.startswith("organism/") and (data_dir() / name).is_dir():
        place = str(data_dir() / name)
    path = Path(place)
    is_path = name.startswith((".", "/", "~"))
    if place.endswith(_GGUF) and (path.is_file() or is_path or place.count("/") != 2):
        if not path.is_file():
            raise DataError(f"expected a GGUF file at {name}, found none; give its path, or owner/name/file.gguf")
        source = _Source(name, str(path.parent), path.name)
    elif place.endswith(_GGUF):
        repository, file = place.rsplit("/", 1)
        return _Source(name, repository, file, revision)
    elif is_path and not path.is_dir():
        raise DataError(f"expected a folder with a causal language model at {name}, found none; check the path")
    else:
        source = _Source(name, place, None, None if path.is_dir() else revision)
    if revision is not None and source.revision is None:
        raise DataError(f"expected no revision for files on this disk ({name}), found '{revision}'; leave it out")
    return source


def _device(wanted: str | None) -> str:
    """Return the device to use, after a check that it can hold a tensor.

    Raises:
        DataError: If it cannot.
    """
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except Exception as error:  # each backend of torch raises its own type
        raise DataError(
            f"expected a device of this machine such as cpu{', cuda' if torch.cuda.is_available() else ''}, found "
            f"'{wanted}': {_reason(error)}; give device='cpu'"
        ) from None
    return wanted


@contextmanager
def _in_one_line(source: _Source) -> Iterator[None]:
    """Raise a DataError of one line for whatever the libraries raise inside the block.

    Raises:
        DataError: If loading fails.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # configuration, weights and hub client raise different exception types
        raise DataError(
            f"expected a causal language model at '{source.name}' ({_KINDS}), found {type(error).__name__}: "
            f"{_reason(error)}; {_advice(source, error)}"
        ) from None


def _advice(source: _Source, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what it needs" if source.file is None else "pip install 'geomkit[gguf]'"
    if not Path(source.place).exists():
        return "check the name, the network and your access (hf auth login)"
    return "check that all files of the checkpoint are there and whole, and dtype= and device_map= where given"


def _reason(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


def _load_tokenizer(origin: _Source, base: _Source) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of an adapter if it was saved with one, else that of the model itself."""
    from transformers import AutoTokenizer

    source = base
    if origin is not base and (not Path(origin.place).is_dir() or (Path(origin.place) / "tokenizer.json").is_file()):
        source = origin
    with _in_one_line(origin):
        try:
            return AutoTokenizer.from_pretrained(source.place, **source.options())
        except OSError:
            if source is base:
                raise
            return AutoTokenizer.from_pretrained(base.place, **base.options())


def _load_weights(source: _Source, dtype: str, device_map: "str | dict[str, Any] | None") -> "PreTrainedModel":
    """Return a model whose every weight comes from the checkpoint.

    Raises:
        DataError: If it cannot be loaded, or a weight is missing, unknown or of another shape.
    """
    from transformers import AutoModelForCausalLM

    if source.file is not None and dtype == "auto":
        dtype = "float32"
    more = source.options() | ({} if device_map is None else {"device_map": device_map})
    with _in_one_line(source):
        # Sizes that differ are let through here, and refused below by their names.
        model, report = AutoModelForCausalLM.from_pretrained(
            source.place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **more
        )
    refuse_wrong_weights(report, source.name)
    if source.file is not None:
        # The weights are plain numbers now; transformers would refuse to save what it still calls quantised.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # An adapter that is trained on it finds the file again by this name.
        model.name_or_path = model.config.name_or_path = f"{source.place}/{source.file}"
    return model


def _adapter_base(source: _Source) -> str | None:
    """Return the base model of a PEFT adapter; ``None`` if the source is no adapter.

    Raises:
        DataError: If the adapter's configuration cannot be read or names no base model, or peft is not installed.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if source.file is not None:
        return None
    local = Path(source.place)
    if local.is_dir() and not (local / "adapter_config.json").is_file():
        return None
    with _in_one_line(source):
        file = find_adapter_config_file(source.place, revision=source.revision)
        if file is None:
            return None
        base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    require_peft(f"the adapter '{source.name}'")
    if not isinstance(base, str) or not base:
        raise DataError(
            f"expected base_model_name_or_path in the adapter's {file}, found {base!r}; write the base model there"
        )
    if base.startswith(("/", ".", "~")) and not Path(base).expanduser().exists():
        raise DataError(
            f"expected the base model of the adapter '{source.name}' at {base}, found none; write its new place as "
            f"base_model_name_or_path into {file}"
        )
    return base


def with_merged_adapters(adapted: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model below adapters of PEFT, with the adapters merged into its weights, in evaluation mode.

    PEFT freezes the weights below adapters; a merged model is trained like any other, so they are trainable again.

    Args:
        adapted: A model with adapters; its modules are replaced in place.
    """
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.requires_grad_(True).eval()


def with_saved_adapter(
    model: "PreTrainedModel", place: str | Path, *, revision: str | None = None
) -> "PreTrainedModel":
    """Return a model with a trained adapter of PEFT, all of whose weights come from the adapter's file.

    Args:
        model: The adapter's base model; its modules are replaced in place.
        place: Folder or hub id of the adapter.
        revision: Branch, tag or commit of an adapter on the hub.

    Raises:
        DataError: If the adapter cannot be loaded, or a weight is missing, unknown or of another shape.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    source = _Source(str(place), str(place), revision=revision)
    hub: dict[str, Any] = {} if revision is None else {"revision": revision}
    with _in_one_line(source), _without_warnings_of_peft():
        adapted: PreTrainedModel = PeftModel.from_pretrained(model, source.place, is_trainable=True, **hub)
        saved = load_peft_weights(source.place, device="cpu", **hub)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # Embeddings are saved with an adapter if tokens were added; they are weights of the base model.
    known = set(expected) | set(adapted.state_dict())
    report = {"missing_keys": set(expected) - set(saved), "unexpected_keys": set(saved) - known}
    refuse_wrong_weights(report, source.name)
    return adapted


@contextmanager
def _without_warnings_of_peft() -> Iterator[None]:
    """Silence, inside the block, what is an error here anyway, and the old names that peft uses of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def require_peft(purpose: str) -> None:
    """Check that peft is installed.

    Raises:
        DataError: If it is not.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise DataError(f"expected the package peft for {purpose}, found none; pip install 'geomkit[lora]'") from None


def with_lora(model: "PreTrainedModel", rank: int, *, seed: int = 0) -> "PreTrainedModel":
    """Return a model with new LoRA adapters on all linear layers but the head, which alone are trainable.

    The scaling is 2 (``lora_alpha`` is twice the rank), there is no dropout, and the product of the factors is 0 before
    training, so that the model computes what it did. For other adapters, use peft itself: every function of geomkit
    takes a model of peft.

    Args:
        model: A causal language model of transformers; its modules are replaced in place.
        rank: Rank r of the adapters, at least 1.
        seed: Seed of the factors A; the random state is restored.

    Raises:
        DataError: If peft is not installed, the model has adapters, or the rank is below 1.

    Example:
        >>> import geomkit as gk
        >>> adapted = with_lora(gk.load_organism()[0], rank=2)
        >>> sorted({name.rpartition(".lora_")[2] for name, w in adapted.named_parameters() if w.requires_grad})
        ['A.default.weight', 'B.default.weight']
    """
    import torch

    require_peft("LoRA")
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "get_base_model"):
        raise DataError("expected a model without adapters, found one with; train its own adapters (without --lora)")
    check_option("lora", rank, shown="the rank of LoRA")
    check_options({"seed": seed})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with _without_warnings_of_peft():
            adapted: PreTrainedModel = get_peft_model(model, config)
    # The adapter finds its base model from any working directory.
    if Path(model.name_or_path).exists():
        adapted.peft_config["default"].base_model_name_or_path = str(Path(model.name_or_path).resolve())
    return adapted.eval()


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
    check_options({"seed": seed})
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype)
    return fresh.to(model.device).eval()
