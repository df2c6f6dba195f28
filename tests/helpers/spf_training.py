"""Short runs on tiny models, and what their updates did, measured from copies of the weights and autograd alone."""

import copy

import torch
from torch import nn

from geomkit.inputs.tokens import encode
from tests.helpers.tiny import SAFETY, UTILITY, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def task_loss(model):
    batch = TOKENIZER.apply_chat_template(
        [UTILITY[0]["messages"]], tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def anchors_loss(model, examples=SAFETY):
    """The mean over examples of the mean over assistant tokens, from the logits."""
    losses = []
    for row in encode(TOKENIZER, examples):
        ids = torch.tensor([row.input_ids])
        words = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
        picked = words.gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-picked[torch.tensor(row.loss_mask[1:])].mean())
    return torch.stack(losses).mean()


def safety_gradients(model, examples=SAFETY):
    """Autograd's gradient by every parameter, on a copy in eval mode."""
    twin = copy.deepcopy(model).eval()
    parameters = dict(twin.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    found = torch.autograd.grad(anchors_loss(twin, examples), list(parameters.values()), allow_unused=True)
    return {name: one for name, one in zip(parameters, found, strict=True) if one is not None}


def weights_of(model):
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


def change_of_loss(before, after, gradients):
    """⟨Δθ, g_s⟩ of every parameter."""
    return {name: float(((after[name] - before[name]) * one.double()).sum()) for name, one in gradients.items()}


def run(model, spf, make_optimizer, *, steps=1, accumulate=1, clip=None, watch=None):
    """Train under SPF; ``watch`` is called before and after every step."""
    optimizer = make_optimizer([one for one in model.parameters() if one.requires_grad])
    with spf.attach(model, optimizer) as guard:
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(accumulate):
                (task_loss(model) / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if watch:
                watch("before", model)
            optimizer.step()
            if watch:
                watch("after", model)
    return guard.certificate
