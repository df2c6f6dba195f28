"""Loading a model; the error for a model that cannot be loaded is one sentence."""

import pytest
import torch

from geomkit.errors import DataError
from geomkit.inputs.models import load_model, untrained
from tests.helpers.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_loads_in_eval_mode_with_its_tokenizer(saved):
    model, tokenizer = load_model(saved, device="cpu")
    assert not model.training
    assert tokenizer.pad_token == "[pad]"  # noqa: S105
    for result, wanted in zip(model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(result, wanted)
    assert load_model(str(saved), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def test_stages_of_the_organism_load_by_name():
    assert load_model("organism/aligned")[0].config.hidden_size == 128


@pytest.mark.parametrize("token", ["[end]", "[unknown]", "brush"])
def test_any_token_of_the_vocabulary_can_pad(saved, token):
    assert load_model(saved, pad_token=token)[1].pad_token == token


def test_a_pad_token_from_elsewhere_is_refused(saved):
    with pytest.raises(DataError, match=r"expected a pad token from the vocabulary of '.*', found '<nothing>'"):
        load_model(saved, pad_token="<nothing>")  # noqa: S106


def test_what_is_no_model_is_refused_in_one_line(saved, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    for source, options, message in (
        (tmp_path / "missing", {}, "expected a folder with a causal language model at .*missing, found none"),
        ("no-such-model", {}, "expected a causal language model at 'no-such-model' .* found OSError"),
        ("organism/none", {}, "expected a causal language model at 'organism/none'"),
        (tmp_path / "broken", {}, "expected a causal language model at '.*broken'"),
        (saved, {"dtype": "float7"}, "expected a causal language model at .*float7"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load_model(source, **options)
        assert "\n" not in str(caught.value)


def test_an_untrained_model_is_decided_by_its_seed_and_leaves_the_random_state_alone():
    model = tiny_llama().bfloat16()
    torch.manual_seed(5)
    first, again, other = untrained(model, seed=1), untrained(model, seed=1), untrained(model, seed=2)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert (first.dtype, first.training, type(first)) == (torch.bfloat16, False, type(model))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for weights in (other, model):
        assert not torch.equal(weights.lm_head.weight, first.lm_head.weight)
    assert [weight.shape for weight in first.parameters()] == [weight.shape for weight in model.parameters()]


def test_an_error_without_words_still_has_a_type(saved, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(DataError, match="found RuntimeError: no reason given"):
        load_model(saved)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own making
def test_nothing_untrained_is_made_of_names_and_adapters():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(DataError, match="expected a transformers model, found a str"):
        untrained("organism/aligned")
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(DataError, match=r"without adapters, found PeftModel; pass model\.get_base_model\(\)"):
        untrained(adapted)
    assert not any("lora" in name for name, _ in untrained(adapted.get_base_model()).named_parameters())
