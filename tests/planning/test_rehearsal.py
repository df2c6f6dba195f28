"""Random gradients and units against those of a real collection and a real guard; times by a clock that is known."""

import warnings
from collections import Counter

import pytest
import torch
from transformers import LlamaForCausalLM

from geomkit.collection.collect import collect_gradients
from geomkit.collection.memory import Counts, aliases_by_parameter
from geomkit.gradients.summed import SumGradient
from geomkit.inputs.tokens import as_encoded
from geomkit.planning import rehearsal
from geomkit.planning.random_gradients import GradientKind
from geomkit.planning.rehearsal import analysis_seconds, guard_seconds, kinds, operations, rehearse, units
from geomkit.planning.speed import PassSpeed, Speed
from geomkit.spf.weights.guarded import Guarded
from tests.helpers.tiny import UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CPU = torch.device("cpu")


def counts():
    return Counts.of(as_encoded(TOKENIZER, UTILITY))


def ticks(step=1.0):
    """Return a clock that goes on by as many seconds at every look."""
    looks = iter(range(10**9))
    return lambda: step * next(looks)


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft's own making
        return peft.get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_random_gradients_have_the_forms_and_sizes_of_collected_ones(tied):
    """Tokens that reach no loss make the difference in rows: in the last layer, two in three."""
    model = tiny_llama(tied=tied)
    found = collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, form="factored", progress=False)
    aliases = aliases_by_parameter(model)
    for name, parameter in model.named_parameters():
        kind = GradientKind.of(parameter, aliases[name])
        for real, amount in zip(found.samples, counts().by_example(), strict=True):
            random = kind.sample(amount, torch.Generator())
            assert type(random) is type(real[name])
            assert random.shape == real[name].shape
            if isinstance(random, SumGradient):
                assert {type(part) for part in random.parts} == {type(part) for part in real[name].parts}
            if parameter.ndim == 2 and "layers.1" not in name:
                assert 0.5 <= random.tokens / real[name].tokens <= 2


def test_every_trainable_parameter_is_of_one_kind():
    model = tiny_llama()
    model.get_input_embeddings().weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert kinds(model).total() == len(trained)
    assert Counter({kind.shape: count for kind, count in kinds(model).items() if len(kind.shape) == 1}) == Counter(
        parameter.shape for parameter in trained if parameter.ndim == 1
    )


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=True), adapted], ids=["plain", "tied", "lora"])
def test_the_units_have_the_blocks_of_a_real_guard(make):
    model = make()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    real = Guarded(model, torch.optim.SGD(trained, lr=0.1), "update")
    collected = dict(model.named_parameters())
    blocks = Counter(tuple(collected[name].shape) for name in real.blocks)
    rehearsed = Counter()
    for unit, count in units(model):
        own = [weight for weight in unit.module.parameters() if weight.requires_grad]
        alone = Guarded(unit.module, torch.optim.SGD(own, lr=0.1), "update")
        for name in alone.blocks:
            rehearsed[unit.kinds[name].shape] += count
    assert rehearsed == blocks


@pytest.mark.parametrize("make", [tiny_llama, adapted], ids=["plain", "lora"])
def test_a_rehearsal_leaves_the_model_alone_and_counts_every_parameter(make):
    """By a clock on which everything takes a second, the sums are the numbers of parameters and of guards."""
    model = make()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    one = PassSpeed(1.0, 0.0)
    speed = Speed(one, one, one, products=1.0, updates=1.0, device=CPU, clock=ticks())
    found = rehearse(model, counts(), counts(), speed)
    assert found.analysis == sum(weight.requires_grad for weight in model.parameters())
    assert found.guard == 1.0  # one block takes as long as two: all of it is done once a step
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.grad is None


def test_what_a_guard_does_once_a_step_counts_once(monkeypatch):
    """With half a second a step and two seconds a block, the whole is what such a guard takes."""
    monkeypatch.setattr(rehearsal, "guard_seconds", lambda layers, *_: 0.5 + 2.0 * len(layers))
    model = tiny_llama()
    one = PassSpeed(1.0, 0.0)
    speed = Speed(one, one, one, products=1.0, updates=1.0, device=CPU, clock=ticks())
    assert rehearse(model, counts(), counts(), speed).guard == 0.5 + 2.0 * len(list(model.parameters()))


def test_a_rehearsal_needs_shapes_only():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)
    for unit, _ in units(model):
        assert guard_seconds([unit], counts().total, CPU, ticks()) == 1.0


def test_fewer_examples_stand_for_those_of_a_large_parameter(monkeypatch):
    """The seconds are scaled by the operations."""
    monkeypatch.setattr("geomkit.planning.rehearsal._MOST_OPERATIONS", 1.0)
    kind = max(kinds(tiny_llama()), key=lambda kind: torch.Size(kind.shape).numel())
    whole = counts()
    scale = operations(kind, whole) / operations(kind, whole.subset(3))
    assert scale > 1
    assert analysis_seconds(kind, whole, CPU, ticks()) == pytest.approx(scale)
