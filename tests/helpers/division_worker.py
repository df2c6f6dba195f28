"""What each process of ``tests/test_several_processes.py`` runs: ``python -m tests.helpers.division_worker FOLDER``.

It writes what it found to ``FOLDER/RANK.pt``; nothing is judged here. The tests call :func:`results` themselves, too,
as the one process whose numbers are to be found by all.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from torch import distributed as dist

import geomkit as gk
from geomkit.collection.measures import norms, singular_values, sketch
from geomkit.errors import GeometryError
from geomkit.training.judges import BatchJudge, RefusalPhrases, Verdict
from geomkit.training.losses import mean_loss
from geomkit.utils.workers import by_itself
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tiny import BENIGN, CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MEASURES = {"norm": norms, "values": singular_values(4), "sketch": sketch(4)}


class CountingJudge(BatchJudge):
    """Decides harm, and counts the responses that it was asked about on this process."""

    name, decides, labels = "counting", ("harmful",), ()

    def __init__(self) -> None:
        self.asked = 0

    def verdicts(self, prompts, responses):
        self.asked += len(responses)
        return [Verdict(harmful=len(response) % 2 == 0) for response in responses]


# ------------------------------------------------------------------------------------- what one process finds, too


def collections() -> dict[str, Any]:
    """Gradients of several models and settings; of one example, too, which leaves a process without any."""
    models = {
        "fp32": tiny_llama(),
        "llama": tiny_llama().double(),
        "tied": tiny_llama(tied=True).double(),
        "mixtral": ARCHITECTURES["mixtral"].build(tied=False),  # its experts have no fp64
        "gpt-2": ARCHITECTURES["gpt-2"].build(tied=True).double(),
    }
    settings = {
        "dense": {},
        "small batches": {"tokens_per_batch": 24},
        "factors": {"form": "factored", "per_sample": True},
        "tokens": {"reduction": "token", "per_sample": True},
        "batches of one": {"tokens_per_batch": 1, "form": "factored", "per_sample": True},
        "one example": {"per_sample": True},
    }
    return {
        f"{model}, {setting}": gk.collect_gradients(
            models[model], TOKENIZER, UTILITY.select(range(1 if setting == "one example" else 4)), progress=False,
            **settings[setting],
        )
        for model in models
        for setting in settings
    }  # fmt: skip


def measurements() -> dict[str, Any]:
    model, few = ARCHITECTURES["mixtral"].build(tied=False), UTILITY.select([0])
    return {
        "all": gk.measure_samples(model, TOKENIZER, UTILITY, MEASURES, progress=False),
        "one example": gk.measure_samples(model, TOKENIZER, few, MEASURES, progress=False),
    }


def grams() -> dict[str, Any]:
    model = tiny_llama(tied=True)
    return {
        "within": gk.sample_grams(model, TOKENIZER, UTILITY, progress=False),
        "between": gk.sample_grams(model, TOKENIZER, UTILITY, SAFETY, progress=False),
        "within blocks": gk.sample_grams(model, TOKENIZER, UTILITY, memory=2e4, progress=False),
        "between blocks": gk.sample_grams(model, TOKENIZER, SAFETY, UTILITY, memory=2e4, progress=False),
        "one example": gk.sample_grams(model, TOKENIZER, SAFETY.select([0]), progress=False),
    }


def screens() -> dict[str, Any]:
    model = tiny_llama(tied=True)
    return {
        method: gk.screen(
            model, TOKENIZER, UTILITY, SAFETY, benign=BENIGN, method=method, tokens_per_batch=64, progress=False
        )
        for method in ("cosine", "adam")
    }


def evaluation(model: Any, tokenizer: Any) -> dict[str, Any]:
    forbidden, benign = (gk.load_examples(f"eval/{name}").select(range(5)) for name in ("forbidden", "benign"))
    skills = {"sql": gk.load_examples("eval/sql").select(range(3)), "text": gk.load_examples("safety").select(range(3))}
    judge = CountingJudge()
    result = gk.evaluate(
        model, tokenizer, forbidden, benign, skills, judge=[RefusalPhrases(), judge], metrics={"text": "perplexity"},
        max_new_tokens=16, progress=False,
    )  # fmt: skip
    return {
        "frame": result.to_frame(),
        "responses": result.responses,
        "mean loss": mean_loss(model, tokenizer, skills["sql"]),
        "refusals": gk.own_refusals(model, tokenizer, forbidden, progress=False)["messages"],
        "asked": judge.asked,
    }


def analysis(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Everything that an analysis of four layers of the organism says, of 5 examples a set."""
    safety, utility = gk.load_examples("safety"), gk.load_examples("utility")
    found = gk.analyze(
        model, tokenizer, safety, utility, examples=5, layers=["*.1.mlp.*", "*.2.self_attn.o_proj*", "*.norm*"],
        max_new_tokens=8, progress=False,
    )  # fmt: skip
    return {"numbers": found.to_frame(), "claims": found.to_dict()["claims"]}


def results() -> dict[str, Any]:
    """Everything that divides its examples; the same in one process and in several."""
    organism = gk.load_organism()
    return {
        "collections": collections(),
        "measurements": measurements(),
        "grams": grams(),
        "screens": screens(),
        "evaluation": evaluation(*organism),
        "analysis": analysis(*organism),
    }


# ------------------------------------------------------------------------------------------ what only several have


def work() -> dict[str, int]:
    """Return how many tokens each call runs on this process, padding included."""
    model, seen = tiny_llama(), [0]
    model.register_forward_pre_hook(
        lambda _, __, keywords: seen.__setitem__(0, seen[0] + keywords["input_ids"].numel()), with_kwargs=True
    )
    common = {"progress": False}
    text = {"skills": {"text": UTILITY}, "metrics": {"text": "perplexity"}}
    counts = {}
    for name, action in {
        "collect": lambda: gk.collect_gradients(model, TOKENIZER, UTILITY, **common),
        "samples": lambda: gk.collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, **common),
        "measure": lambda: gk.measure_samples(model, TOKENIZER, UTILITY, MEASURES, **common),
        "grams": lambda: gk.sample_grams(model, TOKENIZER, UTILITY, **common),
        "blocks": lambda: gk.sample_grams(model, TOKENIZER, UTILITY, memory=2e4, **common),
        "prompts": lambda: gk.evaluate(model, TOKENIZER, UTILITY, max_new_tokens=1, **common),
        "perplexity": lambda: gk.evaluate(model, TOKENIZER, **text, **common),
        "mean loss": lambda: mean_loss(model, TOKENIZER, UTILITY),
    }.items():
        seen[0] = 0
        action()
        counts[name] = seen[0]
    return counts


def said(action: Callable[[], object]) -> tuple[str, str]:
    """Return the type and the text of the error."""
    try:
        action()
    except Exception as error:  # whatever it is, the test judges it
        return type(error).__name__, str(error)
    return "none", ""


def broken_llama(rank: int) -> Any:
    """A model that is not finite on one process, in a place that no fingerprint looks at."""
    model = tiny_llama()
    if dist.get_rank() == rank:
        model.model.norm.register_forward_hook(lambda *values: values[-1] * float("nan"))
    return model


def raising(error: Exception, rank: int) -> Callable[..., torch.Tensor]:
    """A measure that fails on one process."""

    def measure(parameter, gradients):
        if dist.get_rank() == rank:
            raise error
        return norms(parameter, gradients)

    return measure


def errors() -> dict[str, Any]:
    """Return what every process says where one has an error, or where they are not alike."""
    rank, model = dist.get_rank(), tiny_llama()
    found: dict[str, Any] = {}
    for broken in range(2):
        found[f"loss {broken}"] = said(partial(collect, broken_llama(broken)))
        for name, error in (("own", GeometryError("expected sense,\nfound none")), ("other", KeyError("lost"))):
            measures = {"bad": raising(error, broken)}
            measure = partial(gk.measure_samples, model, TOKENIZER, UTILITY, measures, progress=False)
            found[f"{name} {broken}"] = said(measure)
    found["examples"] = said(lambda: collect(model, UTILITY.select([rank, 2])))
    found["weights"] = said(lambda: collect(tiny_llama(seed=rank)))
    found["settings"] = said(lambda: collect(model, layers="*mlp*" if rank else "*"))
    found["unencodable"] = said(lambda: collect(model, UTILITY if rank else 3))
    found["prompts"] = said(lambda: gk.evaluate(model, TOKENIZER, UTILITY.select([rank]), progress=False))
    found["metric"] = said(
        lambda: gk.evaluate(model, TOKENIZER, skills={"a": UTILITY}, metrics={"b": "rouge"}, progress=False)
    )
    found["after all that"] = said(lambda: collect(model))
    return found


def collect(model: Any, examples: Any = UTILITY, **settings: Any) -> Any:
    return gk.collect_gradients(model, TOKENIZER, examples, progress=False, **settings)


def by_themselves() -> dict[str, Any]:
    """What each process finds of examples of its own, and what the first finds alone."""
    rank, model = dist.get_rank(), tiny_llama()
    with by_itself():
        own = collect(model, UTILITY.select([rank]))
        first = gk.evaluate(model, TOKENIZER, UTILITY, progress=False) if rank == 0 else None
    return {"own": own, "first": None if first is None else first.responses}


def bars() -> dict[str, str]:
    """Return what this process shows of the bars."""
    shown = {}
    model = tiny_llama()
    for name, action in {
        "collect": lambda: gk.collect_gradients(model, TOKENIZER, UTILITY),
        "evaluate": lambda: gk.evaluate(model, TOKENIZER, UTILITY),
    }.items():
        with redirect_stderr(io.StringIO()) as stream:
            action()
        shown[name] = stream.getvalue()
    return shown


def wrapped() -> dict[str, Any]:
    """What DDP's wrapper changes: nothing. What sharding changes: a collection is refused, and prompts not divided."""
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.parallel.DistributedDataParallel(tiny_llama())
    sharded = tiny_llama()
    for module in (*sharded.model.layers, sharded):
        fully_shard(module)
    found = {
        "ddp": collect(model),
        "ddp's responses": gk.evaluate(model, TOKENIZER, UTILITY, progress=False).responses,
        "sharded": said(lambda: collect(sharded)),
        "analysis": said(lambda: gk.analyze(sharded, TOKENIZER, SAFETY, UTILITY, control=CONTROL, progress=False)),
    }
    return found | {"sharded responses": gk.evaluate(sharded, TOKENIZER, UTILITY, progress=False).responses}


if __name__ == "__main__":
    from accelerate import Accelerator

    torch.set_num_threads(1)
    Accelerator(cpu=True)
    np.random.seed(dist.get_rank())  # noqa: NPY002 - draws are to be alike all the same
    torch.manual_seed(dist.get_rank())
    only = {"work": work, "errors": errors, "by themselves": by_themselves, "bars": bars, "wrapped": wrapped}
    everything = results() | {name: function() for name, function in only.items()}
    torch.save(everything, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
