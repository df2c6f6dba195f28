"""Exact derivative of every token's loss along one direction in weight space, in one forward pass.

Forward-mode differentiation computes, together with each activation, the derivative of this activation when the weights
move along the direction. A backward pass for every single token would give the same numbers.
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
from geomkit.gradients.gradient_set import set_norm
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import Batch, collate, plan_batches
from geomkit.inputs.loss import example_losses, token_losses
from geomkit.inputs.model_state import compilation_and_parameter_hooks_off, model_state_kept, one_collection_at_a_time
from geomkit.inputs.parameters import refuse_unseen_values, unwrapped_model
from geomkit.inputs.tokens import Tokens
from geomkit.utils.precision import full_precision

_LEAST_TOLERANCE = 1.5e-3
"""Least tolerance of the check, as a share of the norm of the example's gradient.

Where activations are massive, the backward pass is off by a third of this share, since norms are computed in fp32
whatever the dtype (measured in tests/benchmarks/README.md).
"""

TokenValues = tuple[Tensor, Tensor]
"""(T,) losses in nats and (T,) derivatives of one example's tokens, fp64 on the CPU; zero for tokens without a loss."""


def token_derivatives(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    direction: Mapping[str, LayerGradient],
    *,
    tokens_per_batch: int,
    progress: bool = False,
) -> tuple[list[TokenValues], float]:
    """Return the derivative of each token's loss along the unit vector of a gradient, and each token's loss.

    The model runs in eval mode, and its state is restored. For the shortest example, the sum over tokens is compared
    with a backward pass, which reveals operations that forward mode does not see.

    Args:
        model: A causal language model.
        rows: The examples, each with at least one scored token.
        pad: Id of the token that fills short rows of a batch.
        direction: The gradient by parameter; parameters without a gradient do not move. A tied parameter moves
            wherever it is used.
        tokens_per_batch: Largest number of token positions in a batch, padding included.
        progress: Show a progress bar, in tokens.

    Returns:
        Losses and derivatives of every example, in order, and the norm of the direction before scaling to norm one.

    Raises:
        CollectionError: If the direction has parameters that the model lacks or of another shape, or is zero; if an
            operation has no forward-mode derivative, or a derivative that disagrees with the backward pass; or if a
            value is not finite.
    """
    base_model = unwrapped_model(model)
    values: list[TokenValues | None] = [None] * len(rows)
    with _forward_mode(base_model):
        # 1. The unit direction ḡ / ‖ḡ‖, dense: the tangent of every parameter that moves.
        tangents, norm = _unit_tangents(base_model, direction)
        lengths = [len(row) for row in rows]
        device = next(base_model.parameters()).device
        # 2. A forward pass per batch with dual numbers: activations with their derivatives along the tangents.
        with tqdm(total=sum(lengths), desc="tokens", unit="token", unit_scale=True, disable=not progress) as bar:
            for plan in plan_batches(lengths, tokens_per_batch):
                batch = collate([rows[index] for index in plan], pad, examples=plan).to(device)
                losses, derivatives = _losses_and_derivatives(base_model, batch, tangents)
                for row, index in enumerate(plan):
                    values[index] = (_aligned(losses[row], lengths[index]), _aligned(derivatives[row], lengths[index]))
                bar.update(sum(lengths[index] for index in plan))
        # 3. Check: the derivatives of one example add up to the inner product from a backward pass.
        shortest = min(range(len(rows)), key=lengths.__getitem__)
        _check_against_backward(base_model, collate([rows[shortest]], pad).to(device), tangents, values[shortest])
    return [pair for pair in values if pair is not None], norm


@contextmanager
def _forward_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode and full precision, with operations that have forward-mode derivatives."""
    with ExitStack() as stack:
        for context in (
            torch.inference_mode(False),
            one_collection_at_a_time(model),
            model_state_kept(model),
            compilation_and_parameter_hooks_off(model),
            full_precision(),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no forward-mode derivative
            _eager_experts(model),
        ):
            stack.enter_context(context)
        for module in model.modules():  # eval() may be overridden and have side effects
            module.training = False
        _load_forward_rules()
        yield


def _load_forward_rules() -> None:
    """Make torch load its forward-mode rules now, without the DeprecationWarning that their first use raises."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))  # type: ignore[no-untyped-call]


@contextmanager
def _eager_experts(model: Any) -> Iterator[None]:
    """Run experts as separate products, because the grouped product has no forward-mode derivative."""
    if not hasattr(model, "get_experts_implementation") or not hasattr(model, "set_experts_implementation"):
        yield
        return
    implementation = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(implementation)


def _unit_tangents(model: nn.Module, direction: Mapping[str, LayerGradient]) -> tuple[dict[str, Tensor], float]:
    """Return the direction scaled to norm one, dense and by parameter in the parameter's dtype, and its norm before."""
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
    norm = set_norm(direction)
    if not norm:
        raise CollectionError("expected a safety gradient other than zero, found none; check the loss masks")
    return {
        name: direction[name].scaled(1 / norm).dense().to(parameter.device, parameter.dtype)
        for name, parameter in moved.items()
    }, float(norm)


def _losses_and_derivatives(model: nn.Module, batch: Batch, tangents: Mapping[str, Tensor]) -> TokenValues:
    """Return the (B, L − 1) losses of the next tokens and the derivatives of these losses along the tangents."""
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad(), forward_ad.dual_level():
            moving = {
                name: forward_ad.make_dual(parameters[name].detach(), tangent)  # type: ignore[no-untyped-call]
                for name, tangent in tangents.items()
            }
            dual = token_losses(_WithParameters(model, moving), batch)
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


class _WithParameters(nn.Module):
    """A model that runs with other tensors in the place of some of its parameters, wherever these are used."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that the model's parameters are not registered here as well
        self._replacements = parameters

    def forward(self, **keywords: Any) -> Any:
        return functional_call(self._model[0], self._replacements, (), keywords)


def _aligned(values: Tensor, length: int) -> Tensor:
    """Return (T,) values of one example with the value of each next token at that token's position, zero at the first.

    Args:
        values: (L − 1,) values of the next tokens, padding included.
        length: T, the number of tokens of the example.
    """
    return torch.cat([values.new_zeros(1), values[: length - 1]])


def _check_against_backward(
    model: nn.Module, batch: Batch, tangents: Mapping[str, Tensor], values: TokenValues | None
) -> None:
    """Raise CollectionError if one example's derivatives do not add up to ⟨∇loss, tangent⟩ from a backward pass."""
    parameters = dict(model.named_parameters())
    moved = {name: parameters[name].requires_grad_(True) for name in tangents}
    with torch.enable_grad():
        loss = example_losses(token_losses(model, batch), batch).sum()
        gradients = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
    pairs = [(g.double(), t.double()) for g, t in zip(gradients, tangents.values(), strict=True) if g is not None]
    expected = sum(float((g * t).sum()) for g, t in pairs)
    norm = sum(float(g.square().sum()) for g, _ in pairs) ** 0.5
    scored = int((batch.labels[:, 1:] >= 0).sum())
    mean = float(values[1].sum()) / scored if values is not None else float("nan")
    # Rounding of the parameters' dtype, relative to the gradient's norm: half of its digits.
    tolerance = max(_LEAST_TOLERANCE, max(torch.finfo(tangent.dtype).eps for tangent in tangents.values()) ** 0.5)
    if not abs(mean - expected) <= tolerance * norm:
        raise CollectionError(
            f"expected derivatives that add up to the backward pass's {expected:.4g}, found {mean:.4g}: an operation "
            "is not seen by forward mode; load the model with attn_implementation='eager' and without custom kernels"
        )
