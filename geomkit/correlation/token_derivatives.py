"""The exact derivative of every token's loss along one direction in weight space, in one forward pass.

Forward-mode differentiation carries, beside each activation, how fast it changes when the weights move along the
direction; a backward pass per token would give the same numbers.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from geomkit.errors import CollectionError
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import Batch, collate, plan_batches
from geomkit.inputs.loss import example_losses, token_losses
from geomkit.inputs.model_state import as_found, differentiated_as_written, one_at_a_time
from geomkit.inputs.parameters import refuse_unseen_values, unwrapped_model
from geomkit.inputs.tokens import Tokens
from geomkit.utils.precision import full_precision

TokenValues = tuple[Tensor, Tensor]
"""(T,) losses in nats and (T,) derivatives of one example's tokens, fp64 on the CPU; zero where none is scored."""


def token_derivatives(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    direction: Mapping[str, LayerGradient],
    *,
    tokens_per_batch: int,
    progress: bool = False,
) -> tuple[list[TokenValues], float]:
    """Differentiate each token's loss along the unit vector of a gradient.

    The model runs in eval mode and is left as found. For the shortest example, the sum over tokens is compared with
    what a backward pass says: an operation that forward mode passes by unseen would show there.

    Args:
        model: A causal language model.
        rows: The examples, each with a scored token.
        pad: The id that fills short rows.
        direction: By parameter; parameters without one do not move. A tied parameter moves wherever it is used.
        tokens_per_batch: Most positions run at a time.
        progress: Show a bar, in tokens.

    Returns:
        Losses and derivatives of every example, in order, and the norm of the direction before it was scaled to one.

    Raises:
        CollectionError: If the direction has parameters that the model lacks or of another shape, or is zero; if an
            operation has no forward-mode derivative, or one that disagrees with the backward pass; or if a value is
            not finite.
    """
    inner = unwrapped_model(model)
    found: list[TokenValues | None] = [None] * len(rows)
    with _at_rest(inner):
        tangents, norm = _tangents(inner, direction)
        lengths = [len(row) for row in rows]
        device = next(inner.parameters()).device
        with tqdm(total=sum(lengths), desc="tokens", unit="token", unit_scale=True, disable=not progress) as bar:
            for plan in plan_batches(lengths, tokens_per_batch):
                batch = collate([rows[index] for index in plan], pad, examples=plan).to(device)
                losses, derivatives = _differentiated(inner, batch, tangents)
                for row, index in enumerate(plan):
                    found[index] = tuple(_placed(values[row], lengths[index]) for values in (losses, derivatives))  # type: ignore[assignment]
                bar.update(sum(lengths[index] for index in plan))
        shortest = min(range(len(rows)), key=lengths.__getitem__)
        _compare(inner, collate([rows[shortest]], pad).to(device), tangents, found[shortest])
    return [values for values in found if values is not None], norm


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Let a model run in eval mode, as written and in full precision, with operations that have derivatives."""
    with ExitStack() as stack:
        for context in (
            torch.inference_mode(False),
            one_at_a_time(model),
            as_found(model),
            differentiated_as_written(model),
            full_precision(),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no forward-mode derivative
            _experts_one_by_one(model),
        ):
            stack.enter_context(context)
        for module in model.modules():  # eval() may be overridden, and do more than that
            module.training = False
        _load_rules()
        yield


def _load_rules() -> None:
    """Let torch load its rules for forward mode, which it does on first use with a deprecation warning of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))  # type: ignore[no-untyped-call]


@contextmanager
def _experts_one_by_one(model: Any) -> Iterator[None]:
    """Run experts as separate products: the grouped product has no forward-mode derivative."""
    if not hasattr(model, "get_experts_implementation") or not hasattr(model, "set_experts_implementation"):
        yield
        return
    found = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(found)


def _tangents(model: nn.Module, direction: Mapping[str, LayerGradient]) -> tuple[dict[str, Tensor], float]:
    """Return the unit direction by parameter, dense and in the parameters' own types, and its norm."""
    parameters = dict(model.named_parameters())
    if unknown := [name for name in direction if name not in parameters]:
        raise CollectionError(
            f"expected gradients of this model's parameters, found {len(unknown)} of others "
            f"({', '.join(unknown[:3])}); collect the safety gradient from the same model"
        )
    moved = {name: parameters[name] for name in direction}
    refuse_unseen_values(moved, CollectionError)
    for name, parameter in moved.items():
        if tuple(parameter.shape) != tuple(direction[name].shape):
            raise CollectionError(
                f"expected a gradient of shape {tuple(parameter.shape)} for {name}, found {direction[name].shape}; "
                "collect the safety gradient from the same model"
            )
    norm = sum(gradient.norm**2 for gradient in direction.values()) ** 0.5
    if not norm:
        raise CollectionError("expected a safety gradient other than zero, found none; check the loss masks")
    return {
        name: direction[name].scaled(1 / norm).dense().to(parameter.device, parameter.dtype)
        for name, parameter in moved.items()
    }, float(norm)


def _differentiated(model: nn.Module, batch: Batch, tangents: Mapping[str, Tensor]) -> TokenValues:
    """Return the (B, L − 1) losses of next tokens and their derivatives along the direction."""
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad(), forward_ad.dual_level():
            moving = {
                name: forward_ad.make_dual(parameters[name].detach(), tangent)  # type: ignore[no-untyped-call]
                for name, tangent in tangents.items()
            }
            dual = token_losses(_Moving(model, moving), batch)
            losses, derivatives = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error).lower():
            raise
        raise CollectionError(
            "expected operations with a forward-mode derivative, found one without: "
            f"{str(error).strip().splitlines()[0]}; load the model with attn_implementation='eager' and without custom "
            "kernels"
        ) from error
    if derivatives is None:
        raise CollectionError(
            "expected losses that depend on the parameters of the safety gradient, found none that does; collect it "
            "over parameters that this model uses"
        )
    if not bool(torch.isfinite(losses).all() and torch.isfinite(derivatives).all()):
        raise CollectionError("expected finite losses and derivatives, found others; run the model in fp32")
    return losses.double().cpu(), derivatives.double().cpu()


class _Moving(nn.Module):
    """A model some of whose parameters are replaced while it runs, wherever they are used."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self._model = (model,)  # no submodule: its parameters are not this one's
        self._moving = parameters

    def forward(self, **keywords: Any) -> Any:
        return functional_call(self._model[0], self._moving, (), keywords)


def _placed(values: Tensor, length: int) -> Tensor:
    """Put the value of each next token at its own position; the first token has none."""
    return torch.cat([values.new_zeros(1), values[: length - 1]])


def _compare(model: nn.Module, batch: Batch, tangents: Mapping[str, Tensor], found: TokenValues | None) -> None:
    parameters = dict(model.named_parameters())
    moved = {name: parameters[name].requires_grad_(True) for name in tangents}
    with torch.enable_grad():
        loss = example_losses(token_losses(model, batch), batch).sum()
        gradients = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
    pairs = [(g.double(), t.double()) for g, t in zip(gradients, tangents.values(), strict=True) if g is not None]
    expected = sum(float((g * t).sum()) for g, t in pairs)
    norm = sum(float(g.square().sum()) for g, _ in pairs) ** 0.5
    own = float(found[1].sum()) / int((batch.labels[:, 1:] >= 0).sum()) if found is not None else float("nan")
    tolerance = max(torch.finfo(tangent.dtype).eps for tangent in tangents.values()) ** 0.5
    if not abs(own - expected) <= tolerance * norm:
        raise CollectionError(
            f"expected derivatives that add up to the backward pass's {expected:.4g}, found {own:.4g}: an operation is "
            "not seen by forward mode; load the model with attn_implementation='eager' and without custom kernels"
        )
