"""Training weights of few bits warns in every door, and says what to do."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from geomkit.inputs.models import with_lora
from geomkit.inputs.tokens import encode
from geomkit.spf.callback import SPFCallback
from geomkit.spf.settings import SPF
from geomkit.training.finetune import finetune
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ADVICE = 'load the model with dtype="float32" (--dtype float32) and compute in bfloat16 with bf16=True, or train LoRA'


def by_finetune(model, _):
    finetune(model, TOKENIZER, UTILITY, steps=1, progress=False)


def by_finetune_under_spf(model, _):
    finetune(model, TOKENIZER, UTILITY, SPF(SAFETY), steps=1, progress=False)


def by_attach(model, _):
    SPF(SAFETY, tokenizer=TOKENIZER).attach(model, torch.optim.SGD(model.parameters(), lr=0.1)).detach()


def by_attach_with_masters(model, _):
    spf = SPF(SAFETY, tokenizer=TOKENIZER, master_weights=True)
    spf.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)).detach()


def by_callback(model, folder):
    rows = [{"input_ids": list(row.input_ids), "labels": list(row.input_ids)} for row in encode(TOKENIZER, UTILITY)]
    settings = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    spf = SPFCallback(SPF(SAFETY))
    Trainer(model, settings, train_dataset=rows, processing_class=TOKENIZER, callbacks=[spf]).train()


DOORS = [by_finetune, by_finetune_under_spf, by_attach, by_attach_with_masters, by_callback]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_weights_of_few_bits_warns_once_in_every_door(door, dtype, tmp_path, caplog):
    if dtype == torch.float16:
        door = by_attach  # the other doors train, and a tiny model in fp16 overflows
    door(tiny_llama().to(dtype), tmp_path)
    warnings = [record.getMessage() for record in caplog.records if ADVICE in record.getMessage()]
    (text,) = warnings
    assert text.startswith(f"100% of the trained weights are {str(dtype).removeprefix('torch.')}: the optimizer rounds")


@pytest.mark.parametrize("door", DOORS)
def test_training_in_fp32_and_adapters_in_fp32_on_a_bf16_model_do_not_warn(door, tmp_path, caplog):
    door(tiny_llama(), tmp_path)
    door(with_lora(tiny_llama().bfloat16(), 2), tmp_path)
    assert ADVICE not in caplog.text


def test_the_reason_is_true():
    """Most weights do not move in bfloat16 at the default learning rate, and move in float32."""
    share = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_llama().to(dtype)
        trained = finetune(model, TOKENIZER, UTILITY, steps=2, progress=False).model
        pairs = list(zip(model.parameters(), trained.parameters(), strict=True))
        still = sum(int((a == b).sum()) for a, b in pairs if a.ndim > 1)
        share[dtype] = still / sum(a.numel() for a, _ in pairs if a.ndim > 1)
    assert share[torch.bfloat16] > 0.8
    assert share[torch.float32] < 0.3
