"""The screen against autograd, one row at a time; what it keeps, refuses, says and leaves out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

import geomkit as gk
from geomkit.errors import CollectionError, DataError, GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.inputs.batches import collate
from geomkit.inputs.loss import example_losses, token_losses
from geomkit.screening import row_scores
from geomkit.screening import screen as module
from geomkit.screening.reference import adam_divisors, difference
from geomkit.screening.screening import load_screening
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tiny import BENIGN, SAFETY, UTILITY, conversations, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OBEYED = conversations(
    ("how do i steal the bike", "sure take the bike"),
    ("steal the fence", "sure we can"),
    ("how can we steal a brush", "take a brush"),
)
MODELS = {
    "llama": lambda: tiny_llama().double(),
    "tied": lambda: tiny_llama(tied=True).double(),
    "gpt-2": lambda: ARCHITECTURES["gpt-2"].build(tied=True).double(),
    "mixtral": lambda: ARCHITECTURES["mixtral"].build(tied=False),
}


def screened(model=None, train=UTILITY, safety=SAFETY, **options):
    return gk.screen(model or tiny_llama(), TOKENIZER, train, safety, **{"benign": BENIGN, "progress": False} | options)


def autograd(model, examples):
    """The gradient of each example's loss by parameter, from ``loss.backward()``."""
    model.eval()
    found = []
    for row in gk.encode(TOKENIZER, examples):
        batch = collate([row], TOKENIZER.pad_token_id)
        model.zero_grad()
        example_losses(token_losses(model, batch), batch).sum().backward()
        found.append(
            {
                name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
                for name, weight in model.named_parameters()
            }
        )
    model.zero_grad()
    return found


def inner(a, b):
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_autograd(name):
    model = MODELS[name]()
    found = screened(model, method="adam").rows
    safety = autograd(model, SAFETY)
    mean = {name: sum(one[name] for one in safety) / len(safety) for name in safety[0]}
    rows = autograd(model, UTILITY)
    norm = np.array([inner(row, row) ** 0.5 for row in rows])
    raw = np.array([-inner(row, mean) for row in rows])
    tolerance = 1e-4 if name == "mixtral" else 1e-7
    np.testing.assert_allclose(found.norm, norm, rtol=tolerance)
    np.testing.assert_allclose(found.raw, raw, rtol=10 * tolerance, atol=tolerance * norm.max())
    np.testing.assert_allclose(found.cosine, raw / norm / inner(mean, mean) ** 0.5, rtol=0, atol=10 * tolerance)
    # Adam's divisors, from the benign rows: all of them are drawn.
    usual = autograd(model, BENIGN)
    scaled = {name: value / adam_divisor([row[name] for row in usual]) for name, value in mean.items()}
    adam = np.array([-inner(row, scaled) for row in rows]) / norm / inner(scaled, scaled) ** 0.5
    np.testing.assert_allclose(found.adam, adam, rtol=0, atol=100 * tolerance)
    assert found.tokens.tolist() == [len(row) for row in gk.encode(TOKENIZER, UTILITY)]


def adam_divisor(gradients):
    stacked = torch.stack(gradients).double()
    moment = stacked.mean(0) ** 2 + stacked.var(0, correction=0) / 16
    if not bool(moment.any()):  # an expert that no row uses, which Adam does not move
        return torch.full_like(moment, float("inf"))
    return moment.sqrt().clamp_min(0.1 * float(moment.mean().sqrt()))


@pytest.mark.parametrize("name", ["tied", "mixtral"])
def test_with_obeyed_requests_the_safety_gradient_is_less_theirs(name):
    model, obeyed = MODELS[name](), OBEYED
    found = screened(model, obeyed=obeyed, method="adam")
    means = []
    for examples in (SAFETY, obeyed):
        gradients = autograd(model, examples)
        means.append({key: sum(one[key] for one in gradients) / len(gradients) for key in gradients[0]})
    apart = {key: means[0][key] - means[1][key] for key in means[0]}
    rows = autograd(model, UTILITY)
    raw = np.array([-inner(row, apart) for row in rows])
    tolerance = 1e-4 if name == "mixtral" else 1e-7
    np.testing.assert_allclose(found.rows.raw, raw, atol=10 * tolerance * found.rows.norm.max())
    np.testing.assert_allclose(
        found.rows.cosine, raw / found.rows.norm / inner(apart, apart) ** 0.5, atol=10 * tolerance
    )
    for row, example in zip(found.top, found.top_tokens, strict=True):
        assert -example.total * inner(apart, apart) ** 0.5 == pytest.approx(found.rows.raw[row], rel=1e-3, abs=1e-4)
    assert (found.obeyed, screened().obeyed) == (3, 0)
    assert "of 4 rows make obeying likelier than refusing beyond 24 benign rows" in str(found)
    usual = autograd(model, BENIGN)
    scaled = {key: value / adam_divisor([row[key] for row in usual]) for key, value in apart.items()}
    adam = np.array([-inner(row, scaled) for row in rows]) / found.rows.norm / inner(scaled, scaled) ** 0.5
    np.testing.assert_allclose(found.rows.adam, adam, rtol=0, atol=100 * tolerance)


def test_a_difference_of_gradients_takes_no_third_copy_of_them():
    ones = {name: DenseGradient(torch.ones(2, 3), 1) for name in "ab"}
    twos = {name: DenseGradient(torch.full((2, 3), 2.0), 1) for name in "bc"}
    found = difference(ones, twos)
    assert (ones, twos) == ({}, {})
    assert {name: float(gradient.dense().mean()) for name, gradient in found.items()} == {"a": 1, "b": -1, "c": -2}


@pytest.mark.parametrize(
    ("obeyed", "message"),
    [
        (SAFETY.select([2, 1, 0]), "expected obeyed= rows that are no safety rows, found 3 rows in both"),
        (concatenate_datasets([UTILITY, SAFETY.select([1])]), "no safety rows, found 1 row in both"),
        (BENIGN.select([0, 1]), "expected obeyed= rows that are no benign rows, found 2 rows in both"),
        (UTILITY.select([]), "expected at least one example, found an empty set"),
    ],
)
def test_obeyed_requests_that_are_rows_of_another_role_are_refused(obeyed, message):
    with pytest.raises(DataError, match=message):
        # With gradients in thin form, the difference of equal ones is rounding, not zero.
        screened(tiny_llama(hidden_size=64), obeyed=obeyed)


def test_share_is_that_of_the_leading_left_singular_vectors(monkeypatch):
    monkeypatch.setattr("geomkit.screening.reference.RANK", 2)
    model = tiny_llama().double()
    found = screened(model).rows
    safety = autograd(model, SAFETY)
    mean = {name: sum(one[name] for one in safety) / len(safety) for name in safety[0]}
    for place, row in enumerate(autograd(model, UTILITY)):
        inside = total = 0.0
        for name, gradient in row.items():
            if gradient.ndim == 2:
                basis = torch.linalg.svd(mean[name]).U[:, :2]
                inside += float((basis.T @ gradient).square().sum())
                total += float(gradient.square().sum())
        assert found.share[place] == pytest.approx(inside / total, rel=1e-4)


def test_a_positive_score_is_a_row_whose_step_raises_the_loss_on_refusals():
    model = tiny_llama().double()
    raw = screened(model).rows.raw
    rate = 1e-4
    for place, gradient in enumerate(autograd(model, UTILITY)):
        stepped = tiny_llama().double().eval()
        with torch.no_grad():
            for name, weight in stepped.named_parameters():
                weight.sub_(rate * gradient[name])
        before, after = (mean_loss(one, SAFETY) for one in (model, stepped))
        assert (after - before) / rate == pytest.approx(raw[place], rel=0.05, abs=1e-3)


def mean_loss(model, examples):
    from geomkit.training.losses import mean_loss

    return mean_loss(model, TOKENIZER, examples)


def test_batches_and_layers_make_no_difference_but_for_what_they_leave_out():
    whole, single = screened(), screened(tokens_per_batch=1)
    np.testing.assert_allclose(whole.rows.cosine, single.rows.cosine, atol=1e-5)
    mlp = screened(layers="*.mlp.*")
    assert (mlp.rows.norm < whole.rows.norm).all()


def test_the_organism_has_its_poison_found(organism):
    """30 of 300 rows are obeyed forbidden requests; they are found by gradients alone."""
    train = gk.load_examples("scenarios/poison-10")
    found = gk.screen(*organism, train, gk.load_examples("safety"), benign=task_rows(), progress=False)
    planted = np.array(["DELETE" not in row[-1]["content"] for row in train["messages"]])
    flagged = np.zeros(len(train), dtype=bool)
    flagged[found.flagged()] = True
    assert planted.sum() == 30
    assert (flagged & planted).sum() == 30
    assert (flagged & ~planted).sum() <= 5
    assert len(found.clean(train)) == 300 - flagged.sum()
    assert "Sure" in found.to_frame()["carried_by"][found.top[0]]


def task_rows():
    from random import Random

    from geomkit.experiments.organism.world import World

    requests = World(0).distinct("deletion", "train", 300, Random("null"))
    return conversations(*((request.prompt, request.answer) for request in requests))


# ------------------------------------------------------------------------------------------------ resuming


class StoppedError(Exception):
    """The interruption of a test."""


def test_an_interrupted_screen_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(row_scores, "BATCHES_PER_PART", 1)
    whole = screened(tokens_per_batch=20)
    rows_of = []
    computed = row_scores._chunk_scores

    def counting(model, rows, *rest):
        if len(rows_of) == 2:
            raise StoppedError
        rows_of.append(len(rows))
        return computed(model, rows, *rest)

    monkeypatch.setattr(row_scores, "_chunk_scores", counting)
    with pytest.raises(StoppedError):
        screened(folder=tmp_path, tokens_per_batch=20)
    assert len(list((tmp_path / "parts").iterdir())) == 2
    rows_of.clear()
    monkeypatch.setattr(row_scores, "_chunk_scores", lambda *given: rows_of.append(len(given[1])) or computed(*given))
    resumed = screened(folder=tmp_path, tokens_per_batch=20)
    assert sum(rows_of) < len(UTILITY) + len(BENIGN)
    np.testing.assert_array_equal(resumed.p_values, whole.p_values)
    rows_of.clear()
    screened(folder=tmp_path, tokens_per_batch=20)
    assert rows_of == []


@pytest.mark.parametrize("change", ["model", "train", "safety", "obeyed", "method"])
def test_finished_rows_of_another_screen_are_not_taken(tmp_path, change):
    screened(folder=tmp_path)
    others = {
        "model": {"model": tiny_llama(seed=1)}, "train": {"train": UTILITY.select([3, 2, 1, 0])},
        "safety": {"safety": SAFETY.select([0, 1])}, "obeyed": {"obeyed": OBEYED},
        "method": {"method": "adam"},
    }  # fmt: skip
    found, expected = screened(folder=tmp_path, **others[change]), screened(**others[change])
    np.testing.assert_array_equal(found.rows.raw, expected.rows.raw)
    np.testing.assert_array_equal(found.rows.adam, expected.rows.adam)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [0]}', '{"rows": [99], "values": {}}'])
def test_a_damaged_part_is_named(tmp_path, text):
    screened(folder=tmp_path)
    path = min((tmp_path / "parts").iterdir())
    path.write_text(text)
    with pytest.raises(DataError, match=f"expected finished rows of a screen in {path}, found .*remove the file"):
        screened(folder=tmp_path)


# ------------------------------------------------------------------------------------------------ the result


@pytest.fixture(scope="module")
def found():
    return screened(train=concatenate_datasets([UTILITY, SAFETY]))


def test_frame_and_text(found):
    frame = found.to_frame()
    assert frame["row"].tolist() == list(range(7))
    np.testing.assert_array_equal(frame["p"], found.p_values)
    assert frame["adam"].isna().all()
    assert "of 7 rows raise the safety loss beyond 24 benign rows at a false-discovery level of 10%" in str(found)
    assert (np.argsort(-found.scores, kind="stable") == found.top).all()


def test_contributions_of_tokens_add_up_to_the_score(found):
    norm = gk.collect_gradients(tiny_llama(), TOKENIZER, SAFETY, progress=False).norm
    for row, example in zip(found.top, found.top_tokens, strict=True):
        assert -example.total * norm == pytest.approx(found.rows.raw[row], rel=1e-3, abs=1e-4)


def test_clean_leaves_out_what_is_flagged(found):
    train = concatenate_datasets([UTILITY, SAFETY]).add_column("origin", list(range(7)))
    level = float(np.sort(found.q_values)[2]) + 1e-9
    flagged = found.flagged(level).tolist()
    assert 0 < len(flagged) < 7
    assert found.clean(train, level)["origin"] == [row for row in range(7) if row not in flagged]
    with pytest.raises(DataError, match=r"expected the 7 rows that were screened, in their order, found 4 rows"):
        found.clean(UTILITY)
    with pytest.raises(DataError, match=r"expected a column 'messages', found \['text'\]"):
        found.clean(train.select_columns("origin").rename_column("origin", "text"))
    with pytest.raises(DataError, match=r"expected a datasets.Dataset, found list"):
        found.clean(list(train))
    with pytest.raises(DataError, match=r"expected the 7 rows"):
        found.clean(train.select([1, 0, 2, 3, 4, 5, 6]))
    with pytest.raises(DataError, match=r"expected level to be a finite number above 0 to 1|expected level to be"):
        found.flagged(0)
    with pytest.raises(DataError, match=r"found all 7 beyond the false-discovery level"):
        replace(found, null=replace(found.null, cosine=found.null.cosine - 9)).clean(train)


def test_saved_and_loaded_bit_for_bit(found, tmp_path):
    loaded = load_screening(found.save(tmp_path))
    for name, values in vars(found.rows).items():
        np.testing.assert_array_equal(getattr(loaded.rows, name), values)
    assert str(loaded) == str(found)
    assert loaded._repr_html_() == found._repr_html_()
    np.testing.assert_array_equal(loaded.top_tokens[0].contributions, found.top_tokens[0].contributions)
    path = tmp_path / "screening.json"
    path.write_text(path.read_text().replace('"top": [', '"top": [99, '))
    with pytest.raises(DataError, match="checksum"):
        load_screening(tmp_path)


def test_doubts_are_told():
    shuffled = screened(train=BENIGN, benign=None)
    assert shuffled.null_kind == "shuffled"
    assert "the null is made of shuffled pairs" in shuffled.caution
    longer = conversations(("how do i paint", " ".join(["paint the fence"] * 9)), ("help", "sure"))
    beyond = screened(train=longer)
    assert beyond.beyond_null.tolist() == [True, True]
    assert "2 rows shorter or longer than every null row" in beyond.caution
    shifted = replace(beyond, null=replace(beyond.null, cosine=beyond.null.cosine - 9))
    assert "100% of the rows have p ≤ .05: the set as a whole" in shifted.caution


def test_training_rows_in_the_null_are_told(tmp_path):
    found = screened(train=concatenate_datasets([UTILITY, BENIGN.select([0, 1])]))
    assert "2 training rows among the null rows" in found.caution
    assert load_screening(found.save(tmp_path)).caution == found.caution
    assert "among the null rows" not in screened().caution
    found = screened(train=concatenate_datasets([UTILITY, OBEYED.select([1])]), obeyed=OBEYED)
    assert "1 training row among the obeyed requests" in found.caution


def test_a_picture_of_another_format_is_refused_and_no_folder_is_made(found, tmp_path):
    with pytest.raises(DataError, match=r"expected .*\.png.*found"):
        found.save(tmp_path / "figure.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_forward_mode_is_screened_without_tokens(monkeypatch):
    def refuse(*_, **__):
        raise gk.errors.CollectionError("expected operations with a forward-mode derivative, found one without")

    monkeypatch.setattr(module, "token_derivatives", refuse)
    found = screened()
    assert found.top_tokens == ()
    assert "no contributions of tokens: expected operations" in found.caution
    assert set(found.to_frame()["carried_by"]) == {""}
    assert "The rows with the highest scores" not in found._repr_html_()


# ------------------------------------------------------------------------------------------------ wrong input


def test_too_few_null_rows_and_wrong_methods_are_refused():
    with pytest.raises(
        DataError, match=r"expected at least 20 different benign rows to compare with, found 4; give more"
    ):
        screened(benign=UTILITY)
    with pytest.raises(DataError, match=r"expected at least 20 different training rows to compare with, found 4"):
        screened(benign=None)
    with pytest.raises(DataError, match=r"expected at least 20 different benign rows to compare with, found 4"):
        screened(benign=concatenate_datasets([UTILITY] * 6))
    with pytest.raises(GeometryError, match=r"expected a method among cosine, raw, adam, found 'cos'; choose one"):
        screened(method="cos")
    same = conversations(*(("paint the fence", "sure"),) * 24)
    with pytest.raises(DataError, match=r"expected responses that differ, .*give benign= rows"):
        screened(train=same, benign=None)


def test_a_folder_that_cannot_be_made_is_refused_before_any_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "safety_reference", lambda *_, **__: pytest.fail("a gradient was computed"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"expected a folder for finished rows at .*file/parts, found Not a directory"):
        screened(folder=tmp_path / "file")


def test_a_safety_gradient_of_zero_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # nothing before the head has a gradient
    with pytest.raises(CollectionError, match="expected a safety gradient other than zero, found none; check"):
        screened(model, layers="*.mlp.*")


def test_divisors_of_adam_are_never_zero():
    rows = gk.encode(TOKENIZER, UTILITY)
    divisors = adam_divisors(tiny_llama(), rows, 0, tokens_per_batch=64)
    assert all(bool((values > 0).all()) for values in divisors.values())


def test_parts_are_plain_json(tmp_path):
    screened(folder=tmp_path)
    parts = [json.loads(path.read_text()) for path in (tmp_path / "parts").iterdir()]
    assert sorted(len(part["rows"]) for part in parts) == [4, 24]
    assert set(parts[0]["values"]) == set(vars(screened().rows))
