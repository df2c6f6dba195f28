"""SPF attached to several optimizers of one model."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

from geomkit.spf.certificate import Certificate
from geomkit.spf.guard import Guard


class GuardGroup:
    """A guard for each of several optimizers, such as Muon for matrices and AdamW for the rest.

    Each step of an optimizer is a guarded step of the weights that this optimizer holds, for which the anchors are run:
    k optimizers cost k passes over the anchors.

    Args:
        guards: The guards, of one model and rule, without a weight in common.
    """

    def __init__(self, guards: Sequence[Guard]) -> None:
        """Keep the guards."""
        self.guards = tuple(guards)

    @property
    def certificate(self) -> Certificate:
        """The certificate of the steps so far of all optimizers, in the order of their numbers.

        Raises:
            SPFError: If weights were moved while no guarded step was seen.
        """
        certificates = [guard.certificate for guard in self.guards]
        records = sorted((record for part in certificates for record in part.records), key=lambda record: record.step)
        return replace(
            certificates[0],
            records=tuple(replace(record, step=number) for number, record in enumerate(records, 1)),
            by_factor={layer: why for part in certificates for layer, why in part.by_factor.items()},
            share=min(sum(part.share for part in certificates), 1.0),
        )

    @property
    def steps(self) -> int:
        """Number of steps so far of all optimizers."""
        return sum(guard.steps for guard in self.guards)

    def mix(self) -> None:
        """Add the safety gradient to ``.grad`` now, as :meth:`Guard.mix` does."""
        for guard in self.guards:
            guard.mix()

    def accept_weights(self) -> None:
        """Take the present weights for those that the last guarded steps left."""
        for guard in self.guards:
            guard.accept_weights()

    def release(self) -> None:
        """End the projection, but raise nothing."""
        for guard in self.guards:
            guard.release()

    def detach(self) -> None:
        """End the projection; the certificate stays available.

        Raises:
            SPFError: If weights were moved while no guarded step was seen.
        """
        with ExitStack() as stack:  # every guard is detached, also after an error
            for guard in self.guards:
                stack.callback(guard.detach)

    def __enter__(self) -> Self:
        """Return the group."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the projection.

        Raises:
            SPFError: If weights were moved while no guarded step was seen, unless another error ends the block.
        """
        if kind is None:
            self.detach()
        else:
            self.release()
