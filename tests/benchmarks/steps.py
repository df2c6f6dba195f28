"""One optimizer step in every way that is compared: plain, under an SPF rule, and with copies of the gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from geomkit.inputs.batches import collate
from geomkit.inputs.tokens import Tokens
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.certificate import Certificate
from geomkit.spf.constraints import ConstraintMeter
from geomkit.spf.guard import Guard, Options
from geomkit.spf.rules import get_rule
from geomkit.spf.weights.guarded import Guarded
from tests.benchmarks.shapes import SHAPES, random_tokens
from tests.benchmarks.workload import Workload

LEARNING_RATE = 1e-5
_BATCHES = 8
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common.

    Attributes:
        size: A name in :data:`~tests.benchmarks.shapes.SHAPES`.
        device: Where the work is done.
        batch: Examples in a batch of the task.
        tokens: Tokens of each.
        anchor_tokens: Tokens of an anchor.
        scored: How many of these, the last ones, are the refusal.
        dtype: Precision of the weights.
    """

    size: str
    device: str
    batch: int
    tokens: int
    anchor_tokens: int
    scored: int
    dtype: str = "float32"

    def anchors(self, count: int) -> list[Tokens]:
        ids = random_tokens(SHAPES[self.size], count, self.anchor_tokens, seed=2)
        mask = tuple(place >= self.anchor_tokens - self.scored for place in range(self.anchor_tokens))
        return [Tokens(tuple(row), mask) for row in ids.tolist()]


@dataclass(eq=False)
class Training:
    """A model on its way through a few random batches, with an optimizer of its own."""

    setting: Setting
    steps: int = 0

    @cached_property
    def workload(self) -> Workload:
        one = self.setting
        dtype = getattr(torch, one.dtype)
        return Workload.build(one.size, device=one.device, dtype=dtype, batch=one.batch * _BATCHES, tokens=one.tokens)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    @property
    def model(self) -> nn.Module:
        return self.workload.model

    def backward(self) -> None:
        start = self.setting.batch * (self.steps % _BATCHES)
        self.workload.loss(self.workload.input_ids[start : start + self.setting.batch]).backward()
        self.steps += 1

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Step(ABC):
    """One way to take a step, from the first one on."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def run(self) -> None:
        self.training.backward()
        self.update()

    @abstractmethod
    def update(self) -> None:
        """Do what is left when the gradients of the task's batch are there."""

    def check(self) -> None:
        """Take a step, and raise where it is wrong."""
        self.run()

    @property
    def fired(self) -> float | None:
        """The mean share of the blocks that were projected, where that is known."""
        return None


class PlainStep(Step):
    def update(self) -> None:
        self.training.update()


class GuardedStep(Step):
    """A step under SPF."""

    def __init__(
        self,
        training: Training,
        rule: str,
        anchors: int = 1,
        rank: int | None = None,
        refresh_energy: float | None = None,
    ) -> None:
        """Attach as :meth:`geomkit.SPF.attach` does, to anchors that are tokens already."""
        super().__init__(training)
        chosen = get_rule(rule, rank)
        guarded = Guarded(training.model, training.optimizer, chosen.level)
        with guarded.collecting():
            pool = AnchorPool(tuple(training.setting.anchors(anchors)), anchors)
            constraint_meter = ConstraintMeter(guarded.model, chosen, pool, pad=0)
        options = Options(refresh_energy=refresh_energy)
        self.guard = Guard(guarded, chosen, constraint_meter, options)

    def update(self) -> None:
        self.training.update()

    def check(self) -> None:
        super().check()
        certificate: Certificate = self.guard.certificate
        # With g_s in the gradient there may be nothing left to project.
        projects = self.fired or self.guard.rule.safety_gradient_weight
        if certificate.guaranteed and (certificate.violations or not projects):
            raise AssertionError(f"expected steps that are projected and keep the promise, found {certificate}")

    @property
    def fired(self) -> float:
        records = self.guard.certificate.records
        return sum(record.fired for record in records) / max(len(records), 1)

    @property
    def factor_bytes(self) -> int:
        """What the gradients of the anchors take: inputs and output gradients of the layers, shared ones once."""
        found = self.guard._measure().gradients
        numbers = [tensor for own in found.values() for one in own for tensor in one.tensors]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in numbers}
        return sum(storages.values())


# -------------------------------------------------------------------------------------------- copied gradients

Rest = Callable[[], float]
"""Says, as a cosine, how much conflict is left of what was projected."""

Projection = Callable[[Tensor, Tensor], Rest | None]
"""Projects a task's gradient in place if it conflicts with a safety gradient."""


class CopiedStep(Step):
    """The published form: copy the task's gradients, run the anchor for its own, project tensor by tensor."""

    def __init__(self, training: Training, project: Projection, anchors: int = 1) -> None:
        super().__init__(training)
        batch = collate(training.setting.anchors(anchors), 0).to(torch.device(training.setting.device))
        self._anchors = batch.inputs() | {"labels": batch.labels}
        self._project = project
        self._shares: list[float] = []

    def update(self) -> None:
        self._projected()
        self.training.update()

    def check(self) -> None:
        self.training.backward()
        worst = max(rest() for rest in self._projected())
        if not worst <= _TOLERANCE[self.training.setting.dtype]:
            raise AssertionError(f"expected gradients without a conflict, found a cosine of {-worst:.1e}")
        self.training.update()

    def _projected(self) -> list[Rest]:
        parameters = list(self.training.model.parameters())
        utility = [parameter.grad.clone() for parameter in parameters]
        self.training.optimizer.zero_grad()
        self.training.model(**self._anchors).loss.backward()
        rests = []
        with torch.no_grad():
            for parameter, own in zip(parameters, utility, strict=True):
                rests.append(self._project(own, parameter.grad))
                parameter.grad = own
        found = [rest for rest in rests if rest is not None]
        self._shares.append(len(found) / len(rests))
        return found

    @property
    def fired(self) -> float:
        return sum(self._shares) / max(len(self._shares), 1)


def project_rank1(utility: Tensor, safety: Tensor) -> Rest | None:
    """The demonstration code's: g_u − g_s ⟨g_u, g_s⟩₋ / ‖g_s‖²."""
    dot = (utility * safety).sum()
    if dot >= 0:
        return None
    utility.sub_(safety * (dot / safety.square().sum()))
    return lambda: _conflict(utility, safety)


def project_left(rank: int, utility: Tensor, safety: Tensor) -> Rest | None:
    """The paper's: (I − UUᵀ) g_u where that conflicts, U from a randomized SVD of every block."""
    if safety.ndim == 1:
        return project_rank1(utility, safety)
    # In fp32, as torch has no decomposition in bf16.
    left = torch.svd_lowrank(safety.float(), q=rank + 5, niter=2)[0][:, :rank].to(utility.dtype)
    if (utility * safety).sum() >= 0:
        return None
    whole = utility.norm()
    utility.sub_(left @ (left.T @ utility))
    return lambda: float((left.T @ utility).norm() / whole)


def _conflict(utility: Tensor, safety: Tensor) -> float:
    return -float((utility * safety).sum() / (utility.norm() * safety.norm()))
