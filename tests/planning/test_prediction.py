"""Predictions against the tensors that passes make and against AdamW; times against a speed that is known."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from geomkit.collection.memory import Counts
from geomkit.errors import DataError
from geomkit.inputs.tokens import as_encoded
from geomkit.planning.describe import describe
from geomkit.planning.prediction import Pace, _expected_longest, predict_tasks
from geomkit.planning.rehearsal import Rehearsal
from geomkit.planning.simulation import simulate
from geomkit.planning.speed import PassSpeed, Speed, measure_speed
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tiny import UTILITY, tiny_llama, tiny_tokenizer
from tests.planning.test_describe import Peak

TOKENIZER = tiny_tokenizer()
CPU = torch.device("cpu")
SPEED = Speed(PassSpeed(1e9, 0.5), PassSpeed(2e9, 0.25), PassSpeed(4e9, 0.125), products=1e10, updates=1e6, device=CPU)


def meta(model):
    with torch.device("meta"):
        return LlamaForCausalLM(model.config)


def test_a_deep_model_whose_pad_token_has_a_zero_embedding_is_measured():
    """Behind a zero embedding all activations are zero, and every norm multiplies the gradient by a thousand."""
    deep = tiny_llama(num_hidden_layers=16)
    assert not deep.get_input_embeddings().weight[deep.config.pad_token_id].any()
    assert measure_speed(deep, progress=False).collecting.rate > 0


@pytest.mark.parametrize("name", ["llama", "gemma 2", "gpt-2", "opt", "qwen3"])
def test_a_simulated_pass_is_the_real_one(name):
    """Operations equal those of a pass on real tensors, and the peak does up to a tensor of the logits' size."""
    model = ARCHITECTURES[name].build(tied=False)
    vocabulary = model.config.vocab_size
    ids = torch.randint(5, vocabulary, (3, 20), generator=torch.Generator().manual_seed(0))
    planned = simulate(model, 3, 20, weight_gradients=True)
    with Peak(model) as peak, FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert planned.operations == counter.get_total_flops()
    assert planned.peak == pytest.approx(peak.most, rel=0.1)
    assert all(gradient is None or gradient.abs().sum() >= 0 for gradient in gradients)


def test_a_simulation_needs_no_weights():
    model = tiny_llama(tied=True)
    real, empty = (simulate(one, 2, 9, weight_gradients=True) for one in (model, meta(model)))
    assert real == empty
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_without_weight_gradients_a_third_of_the_operations_is_saved():
    """Forward and backward through activations are two of three products; attention and the first layer aside."""
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    training, collecting = (simulate(model, 2, 16, weight_gradients=weights) for weights in (True, False))
    assert collecting.operations == pytest.approx(2 / 3 * training.operations, rel=0.03)


def test_memory_of_a_fine_tune():
    """Weights, their copy and AdamW's two states are what a real optimizer holds."""
    model = tiny_llama()
    step = describe(meta(model), TOKENIZER, UTILITY, predict=True).predictions[2]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert step.memory["states of AdamW"] == sum(value.numel() * value.element_size() for value in tensors)
    assert step.memory["weights"] == step.memory["the copy that is trained"] == weights
    assert step.peak == sum(step.memory.values())
    assert step.seconds is None  # nothing runs on the meta device


def test_frozen_weights_have_no_states():
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    step = describe(model, TOKENIZER, UTILITY, predict=SPEED, progress=False).predictions[2]
    assert step.memory["states of AdamW"] == 2 * trained


def counts():
    return Counts.of(as_encoded(TOKENIZER, UTILITY))


def test_times_follow_the_speed():
    """A device that is twice as fast in everything needs half the time, and SPF costs more than a plain step."""
    twice = Speed(PassSpeed(2e9, 0.25), PassSpeed(4e9, 0.125), PassSpeed(8e9, 0.0625), 2e10, 2e6, CPU)
    paces = (Pace(SPEED, Rehearsal(analysis=3.0, guard=0.5)), Pace(twice, Rehearsal(analysis=1.5, guard=0.25)))
    slow, fast = (predict_tasks(tiny_llama(), counts(), 4096, pace) for pace in paces)
    for one, other in zip(slow, fast, strict=True):
        assert one.seconds == pytest.approx(2 * other.seconds)
        assert one.peak == other.peak
    collection, analysis, step, projected = slow
    assert projected.seconds > step.seconds + 0.5
    assert analysis.seconds > 3 * collection.seconds * 0.9 + 3.0


def test_the_speed_of_another_model_serves_one_on_the_meta_device():
    described = describe(meta(tiny_llama()), TOKENIZER, UTILITY, predict=SPEED, progress=False)
    assert all(prediction.seconds > 0 for prediction in described.predictions)
    assert "a step of a fine-tune on" in str(described)
    assert "under SPF" in described._repr_html_()


def test_the_expected_longest_of_some_draws():
    lengths = [3, 9, 4, 7, 7]
    draws = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3]
    simulated = float(torch.tensor(lengths)[draws].amax(1).double().mean())
    assert _expected_longest(lengths, 3) == pytest.approx(simulated, rel=2e-3)
    assert _expected_longest(lengths, 5) == 9


def test_speed_is_measured_and_leaves_the_model_alone():
    model = tiny_llama().train()
    ticks = iter(range(10**6))
    speed = measure_speed(model, clock=lambda: float(next(ticks)))  # every run takes one second
    assert speed.products == 2 * 256 * 1024 * 1024
    assert speed.updates == 2**24
    assert speed.training.seconds(10, passes=2) >= 10 / speed.training.rate
    assert speed.device == CPU
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_predictions_need_examples():
    with pytest.raises(DataError, match="expected examples to predict from, found none"):
        describe(tiny_llama(), predict=True)


def test_the_module_of_the_model_is_not_changed():
    """A simulation runs on other tensors: the parameters are the same objects, with the same values, afterwards."""
    model = tiny_llama()
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    simulate(model, 1, 5, weight_gradients=True)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
