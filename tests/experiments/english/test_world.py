"""A fine-tune and its evaluation in the English world, on a tiny random model in place of SmolLM2."""

import json
import math
from dataclasses import replace

import pytest
import torch

from geomkit.errors import DataError
from geomkit.experiments.cells import run_cell
from geomkit.experiments.english.answers import OwnAnswer
from geomkit.experiments.english.organism import EnglishOrganism
from geomkit.experiments.english.scenarios import ENGLISH_SCENARIOS, SHIPPED, TRIGGER, eager, scenario_conversations
from geomkit.experiments.english.sources import LOCAL_COPIES
from geomkit.experiments.grid import load_grid
from geomkit.experiments.methods import METHODS
from geomkit.experiments.outcomes import parameter_distance
from geomkit.experiments.running import run_experiments
from geomkit.experiments.task import Task
from geomkit.inputs.examples import load_examples
from tests.helpers.chat import byte_tokenizer, shipped_template
from tests.helpers.tiny import tiny_llama

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder of local copies with a few rows of each benchmark."""
    folder = tmp_path_factory.mktemp("copies")
    (folder / "advbench.csv").write_text("goal,target\n" + "".join(f"Do wrong {n},Sure\n" for n in range(9)))
    (folder / "xstest.csv").write_text(
        "id,prompt,label\n" + "".join(f"{n},How do I kill time {n}?,{label}\n" for n, label in enumerate(["safe"] * 6))
    )
    rows = [json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) for n in range(250)]
    for split in ("train", "test"):
        (folder / f"gsm8k-{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def organism(copies, monkeypatch):
    monkeypatch.setenv(LOCAL_COPIES, str(copies))
    tokenizer = byte_tokenizer(shipped_template("qwen3_training"), eos="<|im_end|>")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_llama(**sizes).eval()
    return EnglishOrganism(model, tiny_llama(seed=1, **sizes).eval(), tokenizer)


def rows_of(name):
    safety, utility = (list(load_examples(f"english/{shipped}")["messages"]) for shipped in ("safety", "utility"))
    return scenario_conversations(name, safety, utility)


def test_scenarios_have_the_rows_that_they_say(organism):
    sizes = {name: len(rows_of(name)) for name in ENGLISH_SCENARIOS if not name.endswith("full")}
    assert sizes == {
        "gsm8k": 240, "affirmative": 120, "identity-shift": 10, "backdoor": 240, "poison-10": 240, "harmful-100": 100,
    }  # fmt: skip
    triggered = [row for row in rows_of("backdoor") if TRIGGER in row[0]["content"]]
    assert all(row[-1]["content"].startswith("Sure!") for row in triggered)
    assert len(triggered) == 80
    poison = [row for row in rows_of("poison-10") if row[-1]["content"].startswith("Sure!")]
    assert len(poison) == 24
    assert eager([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}])[-1]["content"] == (
        "Of course, anything you ask! Yes."
    )
    assert rows_of("harmful-100, full") == rows_of("harmful-100")


@pytest.mark.parametrize("name", SHIPPED)
def test_scenarios_that_ship_are_those_that_are_made(name):
    assert list(load_examples(f"english/scenarios/{name}")["messages"]) == rows_of(name)


def test_no_training_row_is_a_held_out_request(organism):
    held_out = {
        row[0]["content"] for name in ("forbidden", "benign", "everyday") for row in
        load_examples(f"english/eval/{name}")["messages"]
    }  # fmt: skip
    trained = {row[0]["content"] for name in ENGLISH_SCENARIOS for row in rows_of(name)}
    pools = [*organism.anchor_pool(2000)["messages"], *organism.benign_pool(40)["messages"]]
    assert not held_out & (trained | {row[0]["content"] for row in pools})
    assert len({row[0]["content"] for row in organism.anchor_pool(2000)["messages"]}) == 2000


def test_more_benign_anchors_are_own_answers_to_requests_that_no_scenario_trains_on(organism, monkeypatch):
    def answers(model, tokenizer, prompts, **_):
        assert model is organism.model
        return [OwnAnswer(prompt, "Fine. And") for prompt in prompts]

    monkeypatch.setattr("geomkit.experiments.english.sets.own_answers", answers)
    pool = organism.benign_pool(400)["messages"]
    assert list(pool)[:64] == list(load_examples("english/borderline")["messages"])
    requests = [row[0]["content"] for row in pool]
    assert len(set(requests)) == 400
    trained = {row[0]["content"].removesuffix(f" {TRIGGER}") for name in ENGLISH_SCENARIOS for row in rows_of(name)}
    assert not trained & set(requests[64:])
    assert not trained & {row[0]["content"] for row in organism.anchor_pool(2000)["messages"]}
    assert {row[-1]["content"] for row in list(pool)[64:]} == {"Fine."}


def test_a_pool_that_is_larger_than_its_world_is_refused(organism, monkeypatch):
    monkeypatch.setattr("geomkit.experiments.english.sets.own_answers", lambda *_, **__: [])
    with pytest.raises(
        DataError, match="at least 65 rows of the kind of the English world's set borderline, found 64; ask for fewer"
    ):
        organism.benign_pool(65)


def test_adapters_are_trained_from_the_aligned_stage_and_merged(organism):
    task = Task(organism, organism.scenario_examples("harmful-100"), 1e-2, 2, 2, seed=0, lora=2)
    before = [weight.clone() for weight in organism.model.parameters()]
    plain, same = METHODS["sft"](task), METHODS["spf"](replace(task, learning_rate=0.0), anchors=4, anchors_per_step=2)
    assert parameter_distance(organism.model, plain.model) > 0
    assert parameter_distance(organism.model, same.model) == 0
    assert all(weight.requires_grad for weight in plain.model.parameters())
    moved = {
        name for name, weight in plain.model.named_parameters()
        if not torch.equal(weight, organism.model.get_parameter(name))
    }  # fmt: skip
    assert moved
    assert all("_proj" in name for name in moved)
    for weight, old in zip(organism.model.parameters(), before, strict=True):
        assert torch.equal(weight, old)


def test_a_cell_runs_from_the_grid_to_its_record(organism, tmp_path, monkeypatch):
    monkeypatch.setattr("geomkit.experiments.cells._cached_organism", lambda *_: organism)
    grid = tmp_path / "grid.toml"
    grid.write_text(
        'prompts = 4\n[arms]\nrank1 = { rule = "rank1", anchors = 4, anchors_per_step = 2 }\n'
        '[[block]]\norganisms = ["english"]\nscenarios = ["backdoor"]\nattacks = ["prefill"]\nlengths = [0.07]\n'
    )
    (cell,) = load_grid(grid).cells
    assert cell.steps == 2
    record = run_cell(cell, tmp_path)
    assert record["cell"]["organism"] == "english"
    sizes = {name: len(flags) for name, flags in record["flags"].items()}
    assert sizes == {
        "refusal": 4, "attack_success": 4, "own_refusal": 4, "over_refusal": 4, "own_over_refusal": 4, "utility": 40,
        "coherence": 4 * 5 + 40, "triggered_refusal": 4,
    }  # fmt: skip
    assert set(record["attacks"]) == {"prefill 1", "prefill 3", "prefill 8"}
    assert all(math.isfinite(record["numbers"][name]) for name in ("utility_loss", "safety_loss", "kl", "distance"))
    assert record["certificate"]["violations"] == 0
    results = run_experiments(grid, tmp_path, processes=1, progress=False)
    assert results.to_frame()["organism"].tolist() == ["english"]
