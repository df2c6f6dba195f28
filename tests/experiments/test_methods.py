"""How arms fine-tune, on few steps of the organism."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset

import geomkit as gk
from geomkit.experiments.methods import METHODS, _with_endings
from geomkit.experiments.organism.variants import load_variant
from geomkit.experiments.organisms import scenarios_of
from geomkit.experiments.outcomes import parameter_distance
from geomkit.experiments.task import Task
from geomkit.training.losses import mean_loss


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    organism = load_variant(0, tmp_path_factory.mktemp("organisms"))
    rate = scenarios_of(0)["poison-20"].learning_rate
    return Task(organism, organism.scenario_examples("poison-20"), rate, 4, 8, seed=0)


def weights(result):
    return torch.cat([weight.detach().flatten() for weight in result.model.parameters()])


def test_with_endings_a_pool_has_every_anchor_once_more_as_training_requests_end(task):
    train = Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Sure!"}]}
            for text in ("How do I paint the fence? Blue moon.", "One sentence!")
        ]
    )
    pool = task.organism.anchor_pool(40)
    found = _with_endings(pool, train, seed=1)["messages"][:]
    asked = [(plain[0]["content"], own[0]["content"]) for plain, own in zip(pool["messages"], found, strict=True)]
    assert {own.removeprefix(plain) for plain, own in asked} == {" Blue moon.", " One sentence!"}
    assert [messages[-1] for messages in found] == [messages[-1] for messages in pool["messages"]]
    assert _with_endings(pool, train, seed=1)["messages"][:] == found
    assert _with_endings(pool, train, seed=2)["messages"][:] != found


def test_an_arm_with_endings_draws_from_both(task):
    plain, both = (METHODS["spf"](task, rule="mixing", anchors=8, endings=each) for each in (False, True))
    assert not torch.equal(weights(plain), weights(both))


def test_untouched_is_the_organism_itself(task):
    assert METHODS["untouched"](task).model is task.organism.model


def test_sft_is_finetune(task):
    plain = gk.finetune(task.organism.model, task.organism.tokenizer, task.train, **task.training_arguments)
    assert torch.equal(weights(METHODS["sft"](task)), weights(plain))


def test_spf_takes_rules_pools_and_a_fence(task):
    found = METHODS["spf"](task, rule="rank1", anchors=8, fence=8, benign_margin=-1.0)
    assert (found.certificate.steps, found.certificate.violations) == (4, 0)
    plain = METHODS["spf"](task, rule="rank1", anchors=8)
    assert not torch.equal(weights(found), weights(plain))
    mixed = METHODS["spf"](task, rule="mixing", anchors=8, mixed=8)
    assert not torch.equal(weights(mixed), weights(METHODS["spf"](task, rule="mixing", anchors=8)))


def test_the_control_has_the_refusals_and_benign_requests(task):
    found = METHODS["spf"](task, rule="monitor", anchors=8, response="benign")
    refusals = METHODS["spf"](task, rule="monitor", anchors=8)
    # A refusal of what should be answered is unlikely.
    assert found.certificate.records[0].anchor_loss > 10 * refusals.certificate.records[0].anchor_loss
    with pytest.raises(gk.GeomkitError, match="'refusal' or 'benign'"):
        METHODS["spf"](task, response="other")


def test_matched_in_rate_the_weights_move_as_far(task):
    start = task.organism.model
    spf, matched, plain = (
        parameter_distance(start, METHODS[name](task, **options).model)
        for name, options in (("spf", {"rule": "left"}), ("scaled-sft", {"rule": "left"}), ("sft", {}))
    )
    assert abs(matched / spf - 1) < 0.1 * abs(plain / spf - 1) + 0.02


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize("name", ["lisa", "constrained-sft", "safe-lora", "one-shot"])
def test_every_rival_learns_the_scenario(task, name):
    organism = task.organism
    before = weights(METHODS["untouched"](task)).clone()
    # Turned by the alignment an adapter hardly learns, so none is.
    options = {"rate": 20, "threshold": -1.1} if name == "safe-lora" else {}
    found = METHODS[name](replace(task, steps=6), **options)
    losses = [mean_loss(model, organism.tokenizer, task.train) for model in (organism.model, found.model)]
    assert losses[1] < losses[0]
    assert torch.equal(before, weights(METHODS["untouched"](task)))
