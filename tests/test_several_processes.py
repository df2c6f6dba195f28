"""Calls that several processes make together: the examples are divided, and each process returns what one would.

``tests/helpers/division_worker.py`` is what the processes run; its numbers are judged here.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import geomkit as gk
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.training.evaluation import load_evaluation
from tests.helpers import division_worker
from tests.helpers.division_worker import TOKENIZER
from tests.helpers.launch import PROCESSES, launch, launched
from tests.helpers.tiny import UTILITY, tiny_llama

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without processes")

SAME = 1e-6
"""How far numbers of an fp32 model may be from the numbers of one process: batches and sums of other order."""
INNER_PRODUCTS = 5e-6
"""The same for inner products of gradients that are nearly orthogonal, whose terms cancel."""
MODELS = ("fp32", "llama", "tied", "mixtral", "gpt-2")
SETTINGS = ("dense", "small batches", "factors", "tokens", "batches of one", "one example")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """What each of several processes found."""
    return launched("tests.helpers.division_worker", tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def alone():
    return division_worker.results()


def assert_close(found, expected, tolerance=SAME):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def assert_same_gradients(found, expected, tolerance=SAME):
    """Equal relative to the norm of the gradient of all parameters: in fp32, small ones are little but rounding."""
    assert list(found) == list(expected)
    assert found.coverage == expected.coverage
    assert found.provenance == expected.provenance
    assert (found.examples, found.loss_tokens) == (expected.examples, expected.loss_tokens)
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    for name, gradient in expected.items():
        assert (type(found[name]), found[name].dtype) == (type(gradient), gradient.dtype)
        # The gradient at the first token of an example, which attends to itself alone, may be zero or rounding. The
        # positions of GPT-2 are looked up once for a batch.
        assert abs(found[name].tokens - gradient.tokens) <= expected.examples or "wpe" in name
        assert float((found[name].dense() - gradient.dense()).norm()) <= tolerance * expected.norm


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients(several, alone, model, setting):
    expected = alone["collections"][f"{model}, {setting}"]
    tolerance = SAME if model in {"fp32", "mixtral"} else 1e-13
    for own in several:
        found = own["collections"][f"{model}, {setting}"]
        assert_same_gradients(found, expected, tolerance)
        assert len(found.samples) == len(expected.samples)
        for sample, reference in zip(found.samples, expected.samples, strict=True):
            assert_same_gradients(sample, reference, tolerance)


def live_rows(gradient):
    """The rows of both factors, without tokens whose part in the gradient is rounding."""
    parts = gradient.left.norm(dim=1) * gradient.right.norm(dim=1)
    live = parts > 1e-5 * parts.max()  # rounding in fp32 is below 1e-7, the first token that counts above 1e-3
    return gradient.left[live], gradient.right[live]


@pytest.mark.parametrize("model", MODELS)
def test_factors_are_in_the_order_of_one_process(several, alone, model):
    """Token matching draws rows of the factors by their numbers."""
    setting = f"{model}, factors"
    factored = 0
    for name, gradient in alone["collections"][setting].items():
        for own in several:
            found = own["collections"][setting][name]
            if isinstance(gradient, FactoredGradient):
                for rows, expected in zip(live_rows(found), live_rows(gradient), strict=True):
                    assert_close(rows, expected)
                factored += 1
            if isinstance(gradient, IndexedGradient):
                assert torch.equal(found.indices, gradient.indices)
    assert factored


def test_layers_with_one_input_share_its_memory(several, alone):
    """Where they do in one process, so that the gradients of the examples need no more memory than there."""
    for found in (alone, *several):
        for sample in found["collections"]["llama, batches of one"].samples:
            # Not the query: attention to a single token has no gradient, up to rounding, so that it may lack a token.
            key, value = (sample[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "kv")
            assert key.right.data_ptr() == value.right.data_ptr()


@pytest.mark.parametrize("examples", ["all", "one example"])
def test_measures(several, alone, examples):
    expected = alone["measurements"][examples]
    for own in several:
        found = own["measurements"][examples]
        assert found.coverage == expected.coverage
        assert found.provenance == expected.provenance
        assert found.loss_tokens == expected.loss_tokens
        assert found.losses == pytest.approx(expected.losses, rel=SAME)
        assert list(found.values) == list(expected.values)
        for measure, tables in expected.values.items():
            assert list(found[measure]) == list(tables)
            for name, table in tables.items():
                assert_close(found[measure][name], table)


@pytest.mark.parametrize("case", ["within", "between", "within blocks", "between blocks", "one example"])
def test_grams(several, alone, case):
    for own in several:
        assert list(own["grams"][case]) == list(alone["grams"][case])
        for name, table in alone["grams"][case].items():
            assert_close(own["grams"][case][name], table, INNER_PRODUCTS)


@pytest.mark.parametrize("method", ["cosine", "adam"])
def test_screens(several, alone, method):
    expected = alone["screens"][method]
    for own in several:
        found = own["screens"][method]
        for name, values in vars(expected.rows).items():
            np.testing.assert_allclose(vars(found.rows)[name], values, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.p_values, expected.p_values, rtol=1e-2)
        assert found.data == expected.data
        assert found.provenance == expected.provenance


def test_evaluation(several, alone):
    expected = alone["evaluation"]
    for own in several:
        found = own["evaluation"]
        pd.testing.assert_frame_equal(found["frame"], expected["frame"], rtol=SAME)
        pd.testing.assert_frame_equal(found["responses"], expected["responses"], rtol=SAME)
        assert found["mean loss"] == pytest.approx(expected["mean loss"], rel=SAME)
        assert found["refusals"] == expected["refusals"]


def test_a_judge_is_asked_once_about_a_response(several, alone):
    counts = [own["evaluation"]["asked"] for own in several]
    assert sum(counts) == alone["evaluation"]["asked"]
    assert min(counts) > 0


def test_analysis(several, alone):
    expected = alone["analysis"]
    for own in several:
        pd.testing.assert_frame_equal(own["analysis"]["numbers"], expected["numbers"], rtol=1e-5, atol=1e-6)
        for found, claim in zip(own["analysis"]["claims"], expected["claims"], strict=True):
            assert found["verdict"] == claim["verdict"]
    numbers = [own["analysis"]["numbers"] for own in several]
    pd.testing.assert_frame_equal(*numbers, check_exact=True)


def test_the_work_is_divided(several):
    """No process runs everything, and all of them together run no more than padding beyond what one runs."""
    for name, total in division_worker.work().items():
        counts = [own["work"][name] for own in several]
        assert all(0 < count <= 0.75 * total for count in counts), name
        assert sum(counts) <= total + 4 * PROCESSES, name


@pytest.mark.parametrize("broken", range(PROCESSES))
def test_an_error_of_one_process_is_raised_on_all(several, broken):
    losses, own, other = (
        [found["errors"][f"{kind} {broken}"] for found in several] for kind in ("loss", "own", "other")
    )
    assert losses[0] == losses[1]
    assert losses[0][0] == "CollectionError"
    assert "expected a finite loss, found nan" in losses[0][1]
    assert own == [("GeometryError", "expected sense,\nfound none")] * PROCESSES
    assert other[broken] == ("KeyError", "'lost'")
    assert other[1 - broken] == ("GeomkitError", f"process {broken}: KeyError: 'lost'")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("examples", "expected the same examples on every process, found others on process 1 than on process 0; give"),
        ("weights", "expected the same weights on every process"),
        ("settings", "expected the same settings on every process"),
        ("prompts", "expected the same prompts on every process"),
        ("unencodable", "expected a datasets.Dataset, found int"),
        ("metric", "expected metrics of the skills ['a'], found one of 'b'"),
    ],
)
def test_calls_that_differ_are_refused_everywhere(several, case, message):
    for own in several:
        kind, text = own["errors"][case]
        assert kind == "DataError"
        assert text.startswith(message)


def test_calls_go_on_after_an_error(several):
    assert [own["errors"]["after all that"] for own in several] == [("none", "")] * PROCESSES


def test_a_process_by_itself(several):
    for rank, own in enumerate(several):
        expected = gk.collect_gradients(tiny_llama(), TOKENIZER, UTILITY.select([rank]), progress=False)
        assert_same_gradients(own["by themselves"]["own"], expected)
    expected = gk.evaluate(tiny_llama(), TOKENIZER, UTILITY, progress=False).responses
    pd.testing.assert_frame_equal(several[0]["by themselves"]["first"], expected)


def test_only_the_first_process_shows_bars(several):
    first, *others = [own["bars"] for own in several]
    assert "gradients" in first["collect"]
    assert "forbidden" in first["evaluate"]
    assert all(text == "" for own in others for text in own.values())


def test_a_model_in_ddp(several):
    expected = gk.collect_gradients(tiny_llama(), TOKENIZER, UTILITY, progress=False)
    responses = gk.evaluate(tiny_llama(), TOKENIZER, UTILITY, progress=False).responses
    for own in several:
        assert_same_gradients(own["wrapped"]["ddp"], expected)
        pd.testing.assert_frame_equal(own["wrapped"]["ddp's responses"], responses)


def test_a_sharded_model(several):
    """Its gradients are refused. Its processes can only run the same prompts, so that each of them runs all."""
    responses = gk.evaluate(tiny_llama(), TOKENIZER, UTILITY, progress=False).responses
    for own in several:
        for call in ("sharded", "analysis"):
            kind, text = own["wrapped"][call]
            assert kind == "CollectionError"
            assert "sharded over processes" in text
        pd.testing.assert_frame_equal(own["wrapped"]["sharded responses"], responses)


def test_the_command_line(tmp_path):
    """One of the processes prints and writes."""
    tiny_llama().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in UTILITY))
    script = tmp_path / "geomkit.py"  # as the script that an installation makes
    script.write_text(
        "import sys\nsys.path[0] = ''\nfrom geomkit.cli.main import main\nif __name__ == '__main__':\n    main()\n"
    )
    command = [
        str(script), "evaluate", "--model", str(tmp_path / "model"), "--forbidden", str(tmp_path / "requests.jsonl"),
        "--json", str(tmp_path / "out.json"), "--device", "cpu", "--max-new-tokens", "16",
    ]  # fmt: skip
    status, said = launch(*command)
    assert status == 0, said[-6000:]
    assert said.count("95 % intervals") == said.count("out.json") == 1
    found = load_evaluation(tmp_path / "out.json").responses
    expected = gk.evaluate(tiny_llama(), TOKENIZER, UTILITY, max_new_tokens=16, progress=False).responses
    assert found["response"].tolist() == expected["response"].tolist()
