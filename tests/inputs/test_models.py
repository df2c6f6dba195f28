"""Loading a model; the error for a model that cannot be loaded is one sentence."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from geomkit.errors import DataError
from geomkit.inputs.models import load_model, untrained, with_lora
from tests.helpers.architectures import ARCHITECTURES
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


# ------------------------------------------------------------------------------------- weights that are not the model's


def change_weights(folder, target, change):
    """Copy a checkpoint, with its weights changed by hand in the file."""
    shutil.copytree(folder, target)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (target / name).is_file():
            save_file(change(load_file(target / name)), target / name, {"format": "pt"})
    return target


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.mlp.up"), r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\); save the model again"),
        (without("lm_head"), r"1 missing \(lm_head\.weight\)"),
        (without("layers.1."), r"9 missing \(.*mlp\.down_proj\.weight, .* and 6 more\)"),
        (lambda weights: weights | {"extra.weight": torch.ones(2)}, r"1 unexpected \(extra\.weight\)"),
        (
            lambda weights: weights | {"model.norm.weight": torch.ones(7)},
            r"1 of another shape \(model\.norm\.weight 7 for 16\)",
        ),
        (
            lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
            r"21 missing \(.*\), 21 unexpected \(_orig_mod\..*it was saved compiled: save model\._orig_mod",
        ),
    ],
)
def test_weights_that_are_missing_unexpected_or_resized_are_named(saved, tmp_path, change, message):
    with pytest.raises(DataError, match=f"expected the weights of the model at '.*', found {message}") as caught:
        load_model(change_weights(saved, tmp_path / "model", change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_checkpoint_need_not_hold_is_no_matter(name, tied, tmp_path):
    """Tied heads and buffers that are computed are in no file."""
    model = ARCHITECTURES[name].build(tied=tied)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")[0].state_dict()
    assert list(loaded) == list(model.state_dict())
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_a_missing_shard_is_one_line(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="5KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(
        DataError, match=r"expected a causal language model at .* found FileNotFoundError: .*model-00002-of"
    ):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------- device, revision, code


def test_a_device_that_is_not_there_and_two_answers_are_refused_before_loading(saved):
    with pytest.raises(DataError, match=r"expected a device of this machine such as cpu.*, found 'cuda:77'"):
        load_model(saved, device="cuda:77")
    with pytest.raises(DataError, match="found 'toaster'"):
        load_model("no-such-model", device="toaster")
    with pytest.raises(DataError, match=r"expected device= or device_map=, found both \(cpu, auto\)"):
        load_model(saved, device="cpu", device_map="auto")
    with pytest.raises(DataError, match=r"expected no revision for files on this disk \(.*\), found 'main'"):
        load_model(saved, revision="main")


def test_a_device_map_is_followed(saved):
    model, _ = load_model(saved, device_map={"": "cpu"})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))


def test_code_of_a_folder_is_never_run(saved, tmp_path, monkeypatch):
    """transformers would ask on stdin, where ``yes |`` answers."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(DataError, match=r"expected a causal language model at .* found ValueError: .*custom code"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture
def adapter(saved, tmp_path):
    model = with_lora(load_model(saved, device="cpu")[0], 3, seed=4)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_an_adapter_loads_on_its_base_model_and_goes_on_training(adapter):
    model, folder = adapter
    loaded, tokenizer = load_model(folder, device="cpu")  # the tokenizer of the base model
    assert tokenizer.pad_token == "[pad]"  # noqa: S105
    assert not loaded.training
    for (name, wanted), (again, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert (name, wanted.requires_grad) == (again, found.requires_grad)
        assert torch.equal(wanted, found)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert not torch.equal(model.get_base_model()(ids).logits, tiny_llama()(ids).logits)  # it changes what is computed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("q_proj.lora_A"), r"2 missing \(.*q_proj\.lora_A\.weight, .*\)"),
        (lambda weights: weights | {"base_model.model.extra.lora_A.weight": torch.ones(2)}, r"1 unexpected \(.*extra"),
    ],
)
def test_weights_that_an_adapter_lacks_are_named(adapter, tmp_path, change, message):
    with pytest.raises(DataError, match=f"expected the weights of the model at '.*', found {message}"):
        load_model(change_weights(adapter[1], tmp_path / "changed", change))


def test_an_adapter_whose_base_model_is_gone_says_where_to_write_the_new_place(adapter):
    _, folder = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, message in (
        ("/moved/away", r"expected the base model of the adapter '.*' at /moved/away, found none; write its new place"),
        (None, r"expected base_model_name_or_path in the adapter's .*adapter_config\.json, found None"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(DataError, match=message):
            load_model(folder)


def test_lora_changes_nothing_before_training_and_is_decided_by_its_seed(saved):
    ids = torch.tensor([[5, 6, 7]])
    torch.manual_seed(5)
    first, again, other = (with_lora(load_model(saved, device="cpu")[0], 2, seed=seed) for seed in (1, 1, 2))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first(ids).logits, tiny_llama()(ids).logits)
    trained = {name: weight for name, weight in first.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two decoder layers
    assert all(torch.equal(weight, dict(again.named_parameters())[name]) for name, weight in trained.items())
    assert any(not torch.equal(weight, dict(other.named_parameters())[name]) for name, weight in trained.items())
    with pytest.raises(DataError, match="expected a model without adapters"):
        with_lora(first, 2)
    with pytest.raises(DataError, match="expected the rank of LoRA to be a whole number from 1 to 100,000, found 0"):
        with_lora(tiny_llama(), 0)


# ---------------------------------------------------------------------------------------------------------- GGUF

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip


def write_gguf(path, model, kind):
    """Write a Llama with the package of llama.cpp; return its weights as that package reads them back."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["[pad]", "[end]", "ab", *"abcdefghijklmnopqrstu"][: config.vocab_size]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    read = {}
    for name, weight in model.state_dict().items():
        short = name.removesuffix(".weight")
        for ours, theirs in _GGUF_NAMES.items():
            short = short.replace(ours, theirs)
        values = weight.numpy()
        quantised = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(values, quantised)
        read[name] = torch.tensor(gguf.quants.dequantize(packed, quantised))
        if "q_proj" in name or "k_proj" in name:  # llama.cpp stores the halves of a rotation interleaved
            heads = config.num_attention_heads
            order = np.arange(len(values)).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
            packed = gguf.quants.quantize(values[order], quantised)
        writer.add_tensor(f"{short}.weight", packed, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_dequantised_to_an_ordinary_model(kind, tmp_path):
    path = tmp_path / "tiny.gguf"
    model = tiny_llama(vocab_size=24, hidden_size=64, intermediate_size=96)
    read = write_gguf(path, model, gguf.GGMLQuantizationType[kind])
    loaded, tokenizer = load_model(path, device="cpu")
    assert (loaded.dtype, tokenizer.eos_token) == (torch.float32, "[end]")
    assert all(torch.equal(value, read[name]) for name, value in loaded.state_dict().items())
    off = max(float((value - read[name]).abs().max()) for name, value in model.state_dict().items())
    assert (off == 0) == (kind == "F32")
    # It saves as any model, and an adapter that is trained on it finds it again.
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved", device="cpu")[0].lm_head.weight, loaded.lm_head.weight)
    with pytest.warns(UserWarning, match="Could not find a config file"):  # peft looks for a folder
        with_lora(loaded, 2).save_pretrained(tmp_path / "adapter")
    assert load_model(tmp_path / "adapter", device="cpu")[0].get_base_model().lm_head.weight.shape == (24, 64)


def test_a_gguf_file_that_is_missing_or_none_is_one_line(tmp_path):
    (tmp_path / "text.gguf").write_text("no model")
    for source, message in (
        (tmp_path / "none.gguf", "expected a GGUF file at .*none.gguf, found none; give its path"),
        ("none.gguf", "expected a GGUF file at none.gguf, found none"),
        (tmp_path / "text.gguf", "expected a causal language model at '.*text.gguf' .*, found "),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load_model(source)
        assert "\n" not in str(caught.value)
