"""The blocks under guard with their protections, which are renewed whenever the constraints are measured."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from geomkit.spf.constraints import ConstraintMeter
from geomkit.spf.demands import Measured
from geomkit.spf.projection.protection import Protection, protect, with_subspaces_of, without_subspaces
from geomkit.spf.projection.reading import Reading, read_all
from geomkit.spf.rule import Rule
from geomkit.spf.weights.blocks import Block, Move
from geomkit.spf.weights.guarded import Guarded


class ProtectedBlocks:
    """The blocks under guard with their protections.

    Args:
        guarded: The weights, divided into blocks.
        constraint_meter: Measures the constraints.
        rule: The rule.
        refresh_every: Number of steps from one measurement to the next.
        refresh_energy: See :class:`~geomkit.spf.guard.Options`.
        seed: Seed of random directions.

    Attributes:
        measured: The constraints; ``None`` if they have to be measured before the next step.
        measured_at: Number of the step of the measurement, from 0.
        protections: For each block with a safety gradient its protection.
    """

    def __init__(
        self,
        guarded: Guarded,
        constraint_meter: ConstraintMeter,
        rule: Rule,
        *,
        refresh_every: int = 1,
        refresh_energy: float | None = None,
        seed: int = 0,
    ) -> None:
        """Start without a measurement."""
        self._guarded, self._constraint_meter, self._rule = guarded, constraint_meter, rule
        self._every, self._energy, self._seed = refresh_every, refresh_energy, seed
        self.measured: Measured | None = None
        self.measured_at = -1
        self.protections: dict[str, Protection] = {}
        self._probes: dict[str, Tensor] = {}  # drawn once for each block
        self._saved: dict[str, tuple[Tensor, float]] = {}  # subspaces of a run that is resumed, until they are used

    def measure(self, step: int, *, is_mixed: bool = False) -> Measured:
        """Return the constraints of a step, measured at the present weights if a measurement is due.

        A measurement without a gradient, as before the first step under the KL loss, serves a single step.

        Args:
            step: Number of the step, from 0.
            is_mixed: Whether the constraints were already measured at this step, to add the safety gradient.
        """
        due = step % self._every == 0 or (self.measured is not None and not self.measured.has_gradient)
        if self.measured is not None and (not due or is_mixed):
            return self.measured
        with self._guarded.collecting():
            local = self._constraint_meter.measure(step, self._guarded.blocks)
            measured = self._guarded.processes.agreed(local)
        self.measured, self.measured_at = measured, step
        self.protections = {name: self._protect(name, measured) for name in measured.gradients}
        self._probes = {
            name: protection.probe for name, protection in self.protections.items() if protection.probe is not None
        }
        return measured

    def _protect(self, name: str, measured: Measured) -> Protection:
        """Return a block's protection for new gradients; former subspaces stay while they hold enough of g_s."""
        gradients, probe, saved = measured.gradients[name], self._probes.get(name), self._saved.pop(name, None)
        former = self.protections.get(name)
        if former is None or former.left is None:
            former = None if saved is None else Protection(gradients, left=saved[0], shortfall=saved[1])
        # 1. A block without former subspaces gets new subspaces.
        if former is None:
            return protect(self._rule, gradients, name, self._seed, probe)
        # 2. A closed subspace stays for good. Another subspace stays while the fraction of the present ‖g_s‖² inside it
        #    is at least `refresh_energy` times the fraction when it was computed.
        bare = without_subspaces(gradients, name, self._seed, probe)
        same = with_subspaces_of(bare, former)
        if self._rule.closed_subspace or (self._energy is not None and same.captured >= self._energy * same.energy):
            return same
        return protect(self._rule, gradients, name, self._seed, probe)

    def read(
        self,
        names: Iterable[str],
        *,
        blocks: Mapping[str, Block] | None = None,
        moves: Mapping[str, Sequence[Move]] | None = None,
        known_dots: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Reading]:
        """Return the readings of blocks by name, see :func:`~geomkit.spf.projection.reading.read_all`.

        Args:
            names: Names of the blocks.
            blocks: Blocks to read in place of the weights, such as gradients.
            moves: Gradients to add to blocks before these are read.
            known_dots: For some of the blocks (m,) ⟨W, g_i⟩, which is then not read.
        """
        protections = {name: self.protections[name] for name in names}
        group = self._guarded.processes.group
        return read_all(
            self._guarded.blocks if blocks is None else blocks, protections, group, moves=moves, known_dots=known_dots
        )

    def discard(self) -> None:
        """Discard the measurement and the probes, after the set of trained weights has changed."""
        self.measured, self._probes = None, {}

    def keep(self, measured: Measured | None) -> None:
        """Keep the measurement or the protections only if the next step uses them, since gradients hold activations."""
        if self._every > 1:
            self.measured = measured
        elif not (self._rule.closed_subspace or self._energy):
            self.protections = {}

    def bases(self) -> dict[str, dict[str, Tensor]]:
        """Return the subspaces for a checkpoint, and discard all measurements, as a resumed run measures anew.

        Returns:
            ``left``: U by block; ``shortfall``: a number by block.
        """
        self.measured = None
        if not self._rule.closed_subspace:
            self.protections = {}
        closed = {name: protection for name, protection in self.protections.items() if protection.left is not None}
        return {
            "left": {name: protection.left for name, protection in closed.items() if protection.left is not None},
            "shortfall": {
                name: torch.tensor(protection.shortfall, dtype=torch.float64) for name, protection in closed.items()
            },
        }

    def load(self, left: Mapping[str, Tensor], shortfall: Mapping[str, Tensor]) -> None:
        """Start from the subspaces of the run that is resumed."""
        self._saved = {name: (basis, float(shortfall[name])) for name, basis in left.items()}
