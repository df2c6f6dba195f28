"""The model card says what was trained and protected, and goes to the hub with the checkpoint."""

import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from geomkit.errors import DataError
from geomkit.spf.settings import SPF
from geomkit.training.finetune import finetune
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama
from tests.training.test_finetune import QUICK, TOKENIZER, unchanged, weights


@pytest.fixture(scope="module")
def tuned():
    spf = SPF(SAFETY, benign=UTILITY)
    return finetune(tiny_llama(), TOKENIZER, UTILITY, spf, weight_decay=0.25, **QUICK)


def facts(card):
    """The rows of all tables of a card."""
    return dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", card, flags=re.MULTILINE))


def test_the_card_has_the_settings_and_the_certificate(tuned):
    card = tuned.card()
    told = facts(card)
    assert told["training examples"] == "4"
    assert told["steps"] == "3"
    assert "epochs" not in told
    assert told["weight_decay"] == "0.25"
    assert told["rule"] == "adaptive-kl-left"
    assert told["anchors"] == "8 drawn for each step from 3 with refusals and 4 benign ones"
    assert told["loss on the anchors"] == "divergence from the model before training"
    assert told["multiple of its gradient that is added"] == "1, up to 10 with the drift"
    assert told["benign fence"] == "none"
    assert float(told["loss at step 3"]) == pytest.approx(tuned.history["loss"].iloc[-1], rel=1e-3)
    assert str(tuned.certificate)[1:] in card
    assert "## What this does not promise" in card
    assert ModelCard(card).data.tags == ["geomkit", "spf", "safety"]


def test_a_plain_fine_tune_is_called_so():
    card = finetune(tiny_llama(), TOKENIZER, UTILITY, **QUICK | {"steps": 1}).card()
    assert "a plain fine-tune" in card
    assert "## Certificate" not in card
    assert ModelCard(card).data.tags == ["geomkit"]


def test_a_hub_model_is_named_and_a_folder_is_not(tuned, tmp_path):
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = "name/base"
    card = finetune(model, TOKENIZER, UTILITY, **QUICK | {"steps": 1}).card()
    assert ModelCard(card).data.base_model == "name/base"
    model.config._name_or_path = model.name_or_path = str(tmp_path)
    card = finetune(model, TOKENIZER, UTILITY, **QUICK | {"steps": 1}).card()
    assert str(tmp_path) not in card
    assert ModelCard(card).data.base_model is None


def test_a_checkpoint_has_its_card(tuned, tmp_path):
    tuned.save(tmp_path / "run", TOKENIZER)
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8") == tuned.card()


UNREACHABLE = HfHubHTTPError.__bases__[0]
"""The base of what the hub's HTTP client raises without a connection: of requests, httpx or httpx2."""


class Hub:
    """A stand-in for the hub that keeps what it is given."""

    def __init__(self, monkeypatch, error=None):
        self.error, self.made, self.files, self.loaded = error, {}, set(), None
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.error:
            raise self.error
        self.made = {"repo_id": repo_id, "private": private, "exist_ok": exist_ok}
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.made |= {"to": repo_id, "message": commit_message}
        self.files = {path.name for path in Path(folder_path).iterdir()}
        self.loaded = AutoModelForCausalLM.from_pretrained(folder_path)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


def test_the_hub_gets_one_commit_with_everything(tuned, monkeypatch):
    hub = Hub(monkeypatch)
    assert tuned.push_to_hub("mine", TOKENIZER, private=True, commit_message="first") == "hub/me/mine/commit/1"
    assert hub.made == {"repo_id": "mine", "private": True, "exist_ok": True, "to": "me/mine", "message": "first"}
    assert hub.files >= {"README.md", "spf.jsonl", "config.json", "model.safetensors", "tokenizer.json"}
    assert unchanged(hub.loaded, weights(tuned.model))


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("no network"), ValueError("a\nbad name"), UNREACHABLE("no network")]
)
def test_a_hub_that_refuses_is_one_line(tuned, monkeypatch, error):
    Hub(monkeypatch, error)
    with pytest.raises(DataError, match=r"expected the hub to take a/b, found (no network|a bad name); check"):
        tuned.push_to_hub("a/b", TOKENIZER)


def test_reporters_see_the_measures_of_spf(monkeypatch, tmp_path):
    class Reporter(TrainerCallback):
        logs: list[dict[str, float]] = []  # noqa: RUF012 - of the class, as the Trainer makes the instance
        saved: list[bool] = []  # noqa: RUF012

        def on_log(self, args, state, control, **kwargs):
            self.logs.append(dict(kwargs["logs"]))

        def on_save(self, args, state, control, **kwargs):
            self.saved.append((tmp_path / "run" / f"checkpoint-{state.global_step}" / "geomkit.json").exists())

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mine", Reporter)
    options = QUICK | {"report_to": "mine", "checkpoints": tmp_path / "run", "save_steps": 2}
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY), **options)
    steps = [log for log in Reporter.logs if "loss" in log]
    assert [log["spf/anchor_loss"] for log in steps] == result.history["spf/anchor_loss"].tolist()
    assert Reporter.saved == [False, False]  # what a reporter adds to a checkpoint is there before it is marked
