"""Evaluation of a model: refusal of forbidden requests, over-refusal of benign requests, and skills."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from geomkit.inputs.examples import tools_of
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.parameters import workers_of
from geomkit.inputs.tokens import EncodedExamples, conversations_of
from geomkit.training.evaluation import Evaluation, Measure
from geomkit.training.evaluation_sets import cases_of, evaluation_sets, skill_metrics, tell_copies
from geomkit.training.judges import BatchJudge, Judge, check_judges, judge_name, try_judges
from geomkit.training.metrics import Metric
from geomkit.training.responses import generate
from geomkit.training.scoring import joined, judged_tables, measures_of_judges, perplexity_of, score_skill, share
from geomkit.utils.options import BATCH_SIZE, MAX_NEW_TOKENS, check_option

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    forbidden: "Dataset | EncodedExamples | None" = None,
    benign: "Dataset | EncodedExamples | None" = None,
    skills: "Mapping[str, Dataset | EncodedExamples] | None" = None,
    *,
    judge: Judge | BatchJudge | Sequence[Judge | BatchJudge] | None = None,
    metrics: Mapping[str, str | Metric] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Evaluation:
    """Let a model answer held-out prompts greedily, and count refusals and right answers.

    Only the sets that are given are run. The shipped organism is the exception: for a tokenizer with the organism's
    vocabulary, which fine-tuned organisms have too, sets that are left out are the organism's held-out sets.

    The processes of a run divide prompts and responses as in :func:`geomkit.collect_gradients`, and each of them
    returns the evaluation of all.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        forbidden: Requests that should be refused; answers to them are not needed.
        benign: Requests that should be answered; answers to them are not needed.
        skills: Sets with reference answers, by name.
        judge: Decides whether a response is a refusal, or does harm; :class:`~geomkit.training.judges.RefusalPhrases`
            when left out. Several judges may decide different things. Each is tried on a greeting first.
        metrics: Metric of each skill, by the name of the skill: a name from
            :func:`~geomkit.training.metrics.metric_names`, or a function of a response and a reference; exact match
            where left out.
        max_new_tokens: Length of the longest response, in tokens.
        batch_size: Prompts answered at a time.
        progress: Show a bar.

    Returns:
        An :class:`~geomkit.training.evaluation.Evaluation`.

    Raises:
        DataError: If there is no set, a set is empty, two sets have the same name, a skill has no reference answer or
            an unknown metric, no judge decides what is asked, or the tokenizer has no chat template or pad token.
        JudgeError: If a judge or a metric fails after the model has answered; its ``responses`` has all answers.
    """
    with workers_of(model).failing_together():
        check_option("max_new_tokens", max_new_tokens)
        check_option("batch_size", batch_size)
        sets = evaluation_sets(tokenizer, forbidden, benign, skills)
        judges = check_judges(judge, of_refusals="benign" in sets)
        cases = {name: cases_of(name, rows) for name, rows in sets.items()}
        metric_of = skill_metrics(metrics, cases)
        tell_copies(sets)
        encoded = {
            name: encoded_for(model, tokenizer, sets[name], progress)
            for name, (_, metric) in metric_of.items()
            if metric is None  # perplexity: the losses of the references, and no responses
        }
    try_judges(judges)
    # All sets are answered before one is judged. One set at a time: a batch takes as long as its longest response, and
    # responses to a set are about equally long.
    responses = {
        name: generate(
            model,
            tokenizer,
            [row.prompt for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
            title=name,
            tools=tools_of(conversations_of(sets[name])),
        )
        for name, rows in cases.items()
        if name not in encoded
    }
    tables = judged_tables(cases, responses, judges)
    measures: dict[str, Measure] = {}
    # Perplexities last: a metric that fails is found before the slow losses.
    for name, (_, metric) in sorted(metric_of.items(), key=lambda skill: skill[1][1] is None):
        if metric is None:
            tables[name], measures[name] = perplexity_of(model, *encoded[name], name, cases[name], progress)
        else:
            tables[name], measures[name] = score_skill(name, tables, metric)
    titles = {name: title for name, (title, _) in metric_of.items()}
    return Evaluation(
        refusal=share(tables.get("forbidden"), "refused"),
        over_refusal=share(tables.get("benign"), "refused"),
        skills={name: measures[name] for name in metric_of},
        responses=joined([tables[name] for name in cases], titles),
        more=measures_of_judges(tables, judges),
        settings={
            "judges": [judge_name(item) for item in judges],
            "metrics": titles,
            "max_new_tokens": max_new_tokens,
        },
    )
