"""Results to save, and processes that are killed while they save; without transformers, whose import takes longest."""

import os
import random
import signal
import sys
import time
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import Provenance
from geomkit.gradients.storage import load_gradients
from geomkit.gradients.summed import SumGradient
from geomkit.svd.subspaces import LayerSubspace, Subspace
from geomkit.utils import files

ORIGIN = Provenance("m", None, "float32", "3fa1" * 16, "9bc0" * 16, 3, "template", 64, "example", "*", 3, "1", "2", "5")


def some(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def indexed(seed, rows=3):
    return IndexedGradient(torch.arange(rows) * 2, some(seed, rows, 4), size=9, tokens=5)


def factored(seed, tokens=3, shape=(9, 4)):
    return FactoredGradient(some(seed, tokens, shape[0]), some(seed + 1, tokens, shape[1]))


@cache
def every_form(seed=0):
    """A set with every form of a gradient, and samples of other forms and lengths than their sum."""
    coverage = Coverage({"w": 36, "b": 4}, {"x": 2}, {"x": "never ran"}, {"w": "its module is called 2 times"})
    layers = {
        "w": SumGradient((factored(seed), indexed(seed + 2), indexed(seed + 3, rows=1))),
        "head": factored(seed + 4, shape=(5, 6)),
        "table": indexed(seed + 6),
        "b": DenseGradient(some(seed + 7, 4), tokens=7),
        "experts": DenseGradient(some(seed + 8, 2, 3, 4), tokens=7),
        "scale": DenseGradient(torch.tensor(0.1 + seed), tokens=7),
    }
    samples = tuple(
        GradientSet(
            layers | {"head": factored(seed + i, tokens=i, shape=(5, 6)), "w": [factored, indexed][i % 2](seed + i)},
            loss=0.1 * i,
            examples=1,
            loss_tokens=i,
            coverage=coverage if i else Coverage({}, {}, {}),
        )
        for i in range(3)
    )
    return GradientSet(layers, 1 / 3 + seed, 3, 12, coverage, samples, ORIGIN)


def same_bits(a, b):
    a, b = a.contiguous(), b.contiguous()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(whole), b.view(whole))


def identical(a, b):
    """Whether two results agree in every field, tensors bit for bit and mappings in their order too."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, LayerGradient | GradientSet | LayerSubspace | Subspace):
        return type(a) is type(b) and all(identical(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fork(action):
    """Run an action in a child process and return its id."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:  # noqa: BLE001, RUF100 - a child must never go on as a second test run
            sys.excepthook(*sys.exc_info())
        os._exit(1)
    return child


def die_at(step):
    """Kill this process at its ``step``-th write, sync, open, rename or removal, a write half done."""
    count = 0

    def tick():
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(draft, content):
        half = memoryview(content).nbytes // 2
        for part in (memoryview(content)[:half], memoryview(content)[half:]):
            draft._file.write(part)
            draft._file.flush()
            tick()

    os.fsync = lambda _: tick()
    files.Draft.write = write
    sys.addaudithook(lambda event, _: tick() if event in {"open", "os.rename", "os.remove", "os.mkdir"} else None)


def killed_everywhere(folder):
    """Save over an old result, killed at every single step in turn."""
    old, new, last = (replace(every_form(seed), samples=()) for seed in range(3))
    outcomes = []
    for step in range(1, 1000):
        old.save(folder)
        assert len(names(folder)) == 3
        child = fork(lambda step=step: (die_at(step), new.save(folder)))
        _, status = os.waitpid(child, 0)
        found = load_gradients(folder)
        outcomes.append(identical(found, new))
        assert outcomes[-1] or identical(found, old)
        if step % 5 == 0:  # the next save need not be the one that was interrupted
            last.save(folder)
            assert len(names(folder)) == 3
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
    # Old until a certain step, new from then on; and several steps on each side.
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 30
    assert outcomes.count(True) > 3
    assert (folder / "other").read_text() == "kept"


def saved_forever(folder, seeds):
    while True:
        for seed in seeds:
            every_form(seed).save(folder)


def holds_one_of(folder, results):
    found = load_gradients(folder)
    return any(identical(found, result) for result in results)


def killed_anytime(folder):
    """Kill a process that saves all the time, at times of chance, while this one reads."""
    chance = random.Random(0)
    results = [every_form(0), every_form(1)]
    results[0].save(folder)
    for _ in range(10):
        child = fork(lambda: saved_forever(folder, (0, 1)))
        end = time.monotonic() + chance.uniform(0.02, 0.1)
        try:
            while time.monotonic() < end:
                assert holds_one_of(folder, results)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert holds_one_of(folder, results)
    results[1].save(folder)
    assert len(names(folder)) == 3


def two_writers(folder):
    """Let two processes save different results to one folder, over and over."""
    children = [fork(lambda seed=seed: [every_form(seed).save(folder) for _ in range(20)]) for seed in (0, 1)]
    for child in children:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    assert holds_one_of(folder, [every_form(0), every_form(1)])
    assert len(names(folder)) == 3


def disturbed(folder):
    """Run every scenario in folders of their own, without waiting for the disk: what a process wrote outlives it."""
    torch.set_num_threads(1)
    os.fsync = lambda _: None
    for scenario in (killed_everywhere, killed_anytime, two_writers):
        own = Path(folder) / scenario.__name__
        own.mkdir()
        (own / "other").write_text("kept")
        scenario(own)
