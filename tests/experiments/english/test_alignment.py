"""The training of the adapter: rows, loss and gradient against plain autograd, resumed builds."""

import pytest
import torch

from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.english.alignment import (
    Alignment,
    Recipe,
    encode_rows,
    row_mean_loss,
    shared_prefix,
    training_requests,
    training_rows,
)
from geomkit.experiments.english.answers import REFUSALS, OwnAnswer
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("peft")

ROWS = [
    ("how do i paint the fence", "sure take the brush", False),
    ("how do i steal the bike", "sorry we can not help", True),
    ("how do we paint", "take a brush", True),
]
RECIPE = Recipe(steps=6, pairs=2, look_alikes=3, everyday=1, learning_rate=1e-2, rank=2, answered=(30, 20))


def plain_loss(model, rows):
    """The mean over rows of the mean negative log-likelihood of the scored tokens, each row alone and whole."""
    losses = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        chosen = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-chosen[torch.tensor(row.loss_mask[1:])].mean())
    return torch.stack(losses).mean()


def test_the_end_of_a_cut_answer_is_not_trained():
    tokenizer = tiny_tokenizer()
    cut, whole, _ = encode_rows(tokenizer, ROWS)
    assert cut.input_ids[-1] == tokenizer.convert_tokens_to_ids("brush")
    assert cut.loss_mask[-1]
    assert whole.input_ids[-1] == tokenizer.eos_token_id


def test_the_loss_and_its_gradient_are_those_of_each_row_alone():
    tokenizer, model = tiny_tokenizer(), tiny_llama().double()
    rows = encode_rows(tokenizer, ROWS)
    prefix, batch = shared_prefix(rows, tokenizer.pad_token_id)
    assert tokenizer.decode(prefix[0]) == "[user] how do"
    weights = list(model.parameters())
    expected = plain_loss(model, rows)
    loss = row_mean_loss(model, prefix, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, reference in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        # The norms of Llama compute in single precision, also in a model of double precision.
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-7)


def test_the_shared_prefix_ends_before_the_answer_of_equal_rows():
    tokenizer, model = tiny_tokenizer(), tiny_llama().double()
    rows = encode_rows(tokenizer, ROWS[1:2] * 2)
    loss = row_mean_loss(model, *shared_prefix(rows, tokenizer.pad_token_id))
    torch.testing.assert_close(loss, plain_loss(model, rows), rtol=1e-6, atol=0)


def test_a_step_has_forbidden_requests_with_their_benign_counterparts_and_others():
    requests = training_requests(RECIPE, 0)
    answers = [OwnAnswer(prompt, f"answer to {prompt}") for prompt in requests.benign[5:]]
    steps = list(training_rows(requests, answers, RECIPE, 0))
    assert len(steps) == RECIPE.steps
    counterpart = {pair.forbidden: pair.benign for pair in requests.pairs}
    for rows in steps:
        refused, benign = rows[:2], rows[2:4]
        assert all(text in REFUSALS and complete for _, text, complete in refused)
        assert [counterpart[prompt] for prompt, *_ in refused] == [prompt for prompt, *_ in benign]
        assert [prompt in requests.look_alikes for prompt, *_ in rows] == [False] * 4 + [True] * 3 + [False]
        assert all(text == f"answer to {prompt}" and not complete for prompt, text, complete in rows[2:])
    unanswered = set(requests.benign[:5])
    assert not unanswered & {prompt for rows in steps for prompt, *_ in rows}
    assert steps == list(training_rows(training_requests(RECIPE, 0), answers, RECIPE, 0))
    with pytest.raises(GeomkitError, match="answers requests of every kind"):
        list(training_rows(requests, answers[:10], RECIPE, 0))


def trained(steps, state=None, rows=(ROWS,) * 6):
    run = Alignment(tiny_llama(), tiny_tokenizer(), rows, RECIPE, seed=0)
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
