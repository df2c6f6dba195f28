"""What a model cannot run is named before it runs: the limits are compared with what the models themselves refuse."""

import logging
from contextlib import suppress

import pytest
import torch
import transformers

import geomkit as gk
from geomkit.collection.measures import norms
from geomkit.errors import DataError
from geomkit.inputs.fits import position_limit, refuse_unfit, stated_positions, vocabulary_size
from geomkit.inputs.tokens import Tokens
from geomkit.training.losses import mean_loss
from geomkit.training.responses import generate
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tiny import SAFETY, UTILITY, conversations, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCABULARY = len(TOKENIZER)
_IDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
_BERT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 20,
}  # fmt: skip
OTHERS = {
    "GPTJ": _GPT | {"rotary_dim": 4},
    "CodeGen": _GPT | {"n_head": 4, "rotary_dim": 4},
    "GPTNeo": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]],
               "max_position_embeddings": 20},
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 20},
    "Bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 1},
    "BioGpt": _BERT,
    "XGLM": {"d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": 20},
    "GPTBigCode": _GPT,
    "CTRL": _GPT | {"dff": 16},
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 1},
    "Bert": _BERT | {"is_decoder": True},
    "Roberta": _BERT | {"is_decoder": True},
    "Bart": {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16,
             "max_position_embeddings": 20, "is_decoder": True},
    "Persimmon": _BERT,
}  # fmt: skip


def build(name):
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].build(tied=False)
    config = getattr(transformers, f"{name}Config")(**OTHERS[name] | _IDS)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def runs(model, length, token=3):
    with torch.no_grad(), suppress(IndexError, RuntimeError):
        model(input_ids=torch.full((1, length), token), use_cache=False)
        return True
    return False


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_the_limits_are_where_the_model_itself_breaks(name):
    model = build(name)
    limit = position_limit(model)
    if limit is None:
        assert runs(model, (stated_positions(model) or 50) + 1)
    else:
        assert runs(build(name), limit)
        assert not runs(model, limit + 1)
    size = vocabulary_size(model)
    assert runs(build(name), 2, size - 1)
    assert not runs(build(name), 2, size)


def gpt2(**changes):
    settings = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8} | changes
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=1, eos_token_id=1, **settings)).eval()


LONG = conversations(("steal", "no"), ("help", "sure"), ("how do i paint the fence", "sure take a brush"))


def doors(tokenizer, examples):
    """Every function that runs a model on somebody's examples."""
    quiet = {"progress": False}
    one_step = {"steps": 1, "batch_size": 1} | quiet
    return {
        "collect": lambda model: gk.collect_gradients(model, tokenizer, examples, **quiet),
        "measure": lambda model: gk.measure_samples(model, tokenizer, examples, {"norm": norms}, **quiet),
        "grams": lambda model: gk.sample_grams(model, tokenizer, examples, **quiet),
        "check": lambda model: gk.check_collection(model, tokenizer, examples, **quiet),
        "describe": lambda model: gk.describe(model, tokenizer, examples),
        "finetune": lambda model: gk.finetune(model, tokenizer, examples, **one_step),
        "anchors": lambda model: gk.finetune(
            model, tokenizer, conversations(("help", "no")), gk.SPF(examples), **one_step
        ),
        "attach": lambda model: gk.SPF(examples, tokenizer=tokenizer).attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1)
        ),
        "loss": lambda model: mean_loss(model, tokenizer, examples),
    }


@pytest.mark.parametrize("door", doors(None, None))
def test_a_row_beyond_the_positions_is_named_in_every_door(door):
    with pytest.raises(DataError, match=r"(example|anchor) 2: expected at most 8 tokens, .* found 13; .*max_length=8"):
        doors(TOKENIZER, LONG)[door](gpt2())


@pytest.mark.parametrize("door", doors(None, None))
def test_an_id_beyond_the_embedding_is_named_in_every_door(door):
    large = tiny_tokenizer()
    large.add_tokens(["swindle"])
    rows = conversations(("help", "no"), ("how do i swindle", "no"))
    with pytest.raises(
        DataError, match=rf"(example|anchor) 1: expected token ids below {VOCABULARY}, .* found {VOCABULARY}; .*resize"
    ):
        doors(large, rows)[door](tiny_llama())


def test_a_pad_token_beyond_the_embedding_is_named():
    padded = tiny_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(DataError, match=rf"the pad token: expected token ids below {VOCABULARY}, .* {VOCABULARY};"):
        gk.collect_gradients(tiny_llama(), padded, SAFETY, progress=False)
    model = tiny_llama()
    model.resize_token_embeddings(len(padded))
    assert gk.collect_gradients(model, padded, SAFETY, progress=False)


def test_prompts_are_checked_and_responses_end_where_the_positions_do(caplog):
    short = [[{"role": "user", "content": "help"}]]
    long = [*short, [{"role": "user", "content": "how do i paint the fence sure take a brush"}]]
    with pytest.raises(DataError, match="prompt 1: expected at most 8 tokens"):
        generate(gpt2(), TOKENIZER, long, progress=False)
    model = gpt2()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.transformer.wte.weight[1] = 0  # no end of the turn
    (answer,) = generate(model, TOKENIZER, short, max_new_tokens=20, progress=False)
    assert len(TOKENIZER(answer)["input_ids"]) <= 5
    assert "end where the model's 8 positions do" in caplog.text


def test_rows_beyond_computed_positions_run_and_are_logged(caplog):
    rows = [Tokens((2,) * 65, (True,) * 65), Tokens((2,), (True,))]
    with caplog.at_level(logging.WARNING, "geomkit"):
        refuse_unfit(tiny_llama(), rows, 0)
    assert "example 0 has 65 tokens, more than the 64 that the model was made for" in caplog.text
    caplog.clear()
    refuse_unfit(tiny_llama(), rows[1:], 0)
    gk.collect_gradients(tiny_llama(), TOKENIZER, UTILITY, progress=False)
    assert not caplog.text


def test_a_model_that_tells_nothing_is_let_pass():
    refuse_unfit(torch.nn.Linear(2, 2), [Tokens((10**6,) * 9, (True,) * 9)], 0)
