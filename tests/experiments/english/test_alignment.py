"""The training of the adapter: rows, loss and gradient against plain autograd, resumed builds."""

import copy

import pytest
import torch

from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.english.alignment import AdapterTraining
from geomkit.experiments.english.alignment_loss import (
    encode_rows,
    row_mean,
    scored_states,
    scored_tokens,
    shared_prefix,
    token_losses,
)
from geomkit.experiments.english.alignment_rows import Recipe, Row, training_requests, training_rows
from geomkit.experiments.english.answers import REFUSALS, OwnAnswer
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("peft")

ROWS = [
    Row("how do i paint the fence", "sure take the brush", "keep"),
    Row("how do i steal the bike", "sorry we can not help", "refuse"),
    Row("how do we paint", "take a brush", "keep whole"),
]
RECIPE = Recipe(steps=6, pairs=2, look_alikes=3, everyday=1, learning_rate=1e-2, rank=2, answered=(30, 20))


def loss_of_each_row_alone(model, base, rows, encoded, prefix_length):
    """The mean over rows of a row's mean loss, from the whole row's logits: cross-entropy, or KL(base ‖ model)."""
    losses = []
    for row, tokens in zip(rows, encoded, strict=True):
        ids = torch.tensor([tokens.input_ids])
        scored = torch.tensor(tokens.loss_mask[1:])
        if row.goal == "keep whole":
            scored = torch.arange(1, len(tokens)) > prefix_length
        found, kept = (torch.log_softmax(each(input_ids=ids).logits[0, :-1], -1) for each in (model, base))
        if row.goal == "refuse":
            losses.append(-found.gather(1, ids[0, 1:, None])[:, 0][scored].mean())
        else:
            losses.append((kept.detach().exp() * (kept.detach() - found)).sum(1)[scored].mean())
    return torch.stack(losses).mean()


def loss_of(model, base, rows, encoded, pad):
    prefix, batch = shared_prefix(encoded, pad)
    scored = scored_tokens(batch, rows)
    refuse = torch.tensor([[row.goal == "refuse"] for row in rows]).expand_as(scored)[scored]
    kept = scored_states(base, prefix, batch.input_ids, scored)[~refuse].detach()
    states = scored_states(model, prefix, batch.input_ids, scored)
    return row_mean(token_losses(model.lm_head, states, batch.input_ids[:, 1:][scored], kept, refuse), scored)


def models():
    """A base model, and one with other weights in its blocks and the same output layer."""
    base = tiny_llama().double()
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model, base


def test_the_end_of_a_cut_answer_is_not_trained():
    tokenizer = tiny_tokenizer()
    cut, refused, _ = encode_rows(tokenizer, ROWS)
    assert cut.input_ids[-1] == tokenizer.convert_tokens_to_ids("brush")
    assert cut.loss_mask[-1]
    assert refused.input_ids[-1] == tokenizer.eos_token_id


def test_the_loss_and_its_gradient_are_those_of_each_row_alone():
    tokenizer, (model, base) = tiny_tokenizer(), models()
    encoded = encode_rows(tokenizer, ROWS)
    prefix, _ = shared_prefix(encoded, tokenizer.pad_token_id)
    assert tokenizer.decode(prefix[0]) == "[user] how do"
    weights = list(model.model.layers.parameters())
    expected = loss_of_each_row_alone(model, base, ROWS, encoded, prefix.shape[1])
    loss = loss_of(model, base, ROWS, encoded, tokenizer.pad_token_id)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, reference in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        # The norms of Llama compute in single precision, also in a model of double precision.
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-7)


def test_the_shared_prefix_ends_before_the_answer_of_equal_rows():
    tokenizer, (model, base) = tiny_tokenizer(), models()
    rows = ROWS[1:2] * 2
    encoded = encode_rows(tokenizer, rows)
    loss = loss_of(model, base, rows, encoded, tokenizer.pad_token_id)
    torch.testing.assert_close(loss, loss_of_each_row_alone(model, base, rows, encoded, 0), rtol=1e-6, atol=0)


def test_a_model_that_is_the_base_loses_nothing_on_what_is_to_be_kept():
    tokenizer, base = tiny_tokenizer(), tiny_llama()
    rows = [ROWS[0], ROWS[2]]
    loss = loss_of(base, base, rows, encode_rows(tokenizer, rows), tokenizer.pad_token_id)
    assert abs(loss.item()) < 1e-6


def test_a_step_has_forbidden_requests_with_their_benign_counterparts_and_others():
    requests = training_requests(RECIPE, 0)
    benign = [*requests.close_to_harm, *requests.everyday]
    answers = [OwnAnswer(prompt, f"answer to {prompt}") for prompt in benign[5:]]
    steps = list(training_rows(requests, answers, RECIPE, 0))
    assert len(steps) == RECIPE.steps
    counterpart = {pair.forbidden: pair.benign for pair in requests.pairs}
    for rows in steps:
        refused, kept = rows[:2], rows[2:4]
        assert all(row.answer in REFUSALS for row in refused)
        assert [counterpart[row.prompt] for row in refused] == [row.prompt for row in kept]
        assert [row.prompt in requests.look_alikes for row in rows] == [False] * 4 + [True] * 3 + [False]
        assert all(row.answer == f"answer to {row.prompt}" for row in rows[2:])
        assert [row.goal for row in rows] == ["refuse"] * 2 + ["keep"] * 5 + ["keep whole"]
    unanswered = set(benign[:5])
    assert not unanswered & {row.prompt for rows in steps for row in rows}
    assert steps == list(training_rows(training_requests(RECIPE, 0), answers, RECIPE, 0))
    with pytest.raises(GeomkitError, match="answers requests of every kind"):
        list(training_rows(requests, answers[:10], RECIPE, 0))


def trained(steps, state=None, rows=(ROWS,) * 6):
    run = AdapterTraining(tiny_llama(), tiny_tokenizer(), rows, RECIPE, seed=0)
    if state is not None:
        run.load(state)
    losses = [run.take() for _ in range(steps)]
    return run, losses


def test_training_lowers_the_loss_and_goes_on_from_a_state_to_the_bit(tmp_path):
    whole, losses = trained(6)
    assert losses[-1] < losses[0]
    half, first = trained(3)
    half.save(tmp_path / "state.pt")
    rest, second = trained(3, tmp_path / "state.pt")
    assert first + second == losses
    assert rest.steps == whole.steps == 6


def test_a_state_of_other_settings_or_a_damaged_one_is_refused(tmp_path):
    run, _ = trained(1)
    run.save(tmp_path / "state.pt")
    with pytest.raises(DataError, match="expected a build of these settings and rows"):
        trained(1, tmp_path / "state.pt", (ROWS[:2],) * 6)
    torch.save([1, 2], tmp_path / "state.pt")
    with pytest.raises(DataError, match="expected the state of a build"):
        trained(1, tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(DataError, match="expected the state of a build"):
        trained(1, tmp_path / "state.pt")
