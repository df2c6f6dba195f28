"""Ctrl-C ends a fine-tune after the step that is running, with a result that can be used, and nothing is half done."""

import os
import signal
import threading

import pytest
import torch
from transformers import TrainerCallback

from geomkit.spf.settings import SPF
from geomkit.training.finetune import finetune
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer
from tests.training.test_finetune import weights

TOKENIZER = tiny_tokenizer()
RUN = {"steps": 5, "learning_rate": 1e-2, "batch_size": 2, "progress": False}


class Interrupt(TrainerCallback):
    """Presses Ctrl-C some times at the beginning of a step, and keeps the weights after each step."""

    def __init__(self, step, times=1):
        self.step, self.times = step, times
        self.weights = {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)

    def on_step_end(self, args, state, control, **kwargs):
        self.weights[state.global_step] = weights(kwargs["model"])


def run(step=None, times=1, **options):
    watch = Interrupt(step, times)
    return finetune(tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY), callbacks=[watch], **RUN | options), watch


def test_the_step_is_finished_and_the_result_is_that_of_a_run_until_then(caplog):
    handler = signal.getsignal(signal.SIGINT)
    whole, along = run()
    assert not whole.interrupted
    assert whole.certificate.steps == 5
    result, _ = run(step=3)
    assert result.interrupted
    assert list(result.history["step"]) == [1, 2, 3]
    assert result.certificate.steps == 3
    assert result.certificate.violations == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(result.model), along.weights[3], strict=True))
    assert not result.model.training
    assert "interrupted" in str(result)
    assert "interrupted" not in str(whole)
    assert "It was interrupted" in result.card()
    assert sum("interrupt again to end it at once" in message for message in caplog.messages) == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_in_the_last_step_there_is_nothing_left_to_interrupt():
    result, _ = run(step=5)
    assert not result.interrupted
    assert result.certificate.steps == 5


def test_a_second_interruption_ends_it_at_once_and_leaves_the_model_free():
    handler = signal.getsignal(signal.SIGINT)
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, TOKENIZER, UTILITY, SPF(SAFETY), callbacks=[Interrupt(3, times=2)], inplace=True, **RUN)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any(module._forward_hooks for module in model.modules())


def test_an_interrupted_run_with_checkpoints_goes_on_to_the_weights_of_a_whole_run(tmp_path):
    whole, _ = run(checkpoints=tmp_path / "whole", save_steps=2)
    first, _ = run(step=3, checkpoints=tmp_path / "run", save_steps=2)
    assert first.interrupted
    rest, _ = run(checkpoints=tmp_path / "run", save_steps=2)
    assert not rest.interrupted
    assert all(torch.equal(a, b) for a, b in zip(weights(rest.model), weights(whole.model), strict=True))


def test_a_process_that_ignores_interruptions_goes_on_to():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result, _ = run(step=3)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not result.interrupted
    assert result.certificate.steps == 5


def test_in_another_thread_no_signal_is_caught():
    done = []
    thread = threading.Thread(target=lambda: done.append(run()[0]))
    thread.start()
    thread.join()
    assert done[0].certificate.steps == 5
