"""Threads and forks: equal results or a refusal, never a wrong mask and never a wait for ever."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import geomkit as gk
from geomkit.errors import CollectionError
from geomkit.inputs.tokens import encode
from tests.helpers.tiny import SAFETY, UTILITY, conversations, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _threads_alternate_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def long_talk(turns):
    words = ["how do i paint", "take a brush", "help", "sure", "no way", "the fence"]
    return [
        {"role": role, "content": words[(turn + place) % len(words)]}
        for turn in range(turns)
        for place, role in enumerate(("user", "assistant"))
    ]


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_threads_encode_as_one_thread_does(own_tokenizer):
    rows = conversations(*[("how do i paint", "take a brush")]).from_list(
        [{"messages": long_talk(turns)} for turns in (1, 3, 6, 2, 5) * 4]
    )
    alone = list(encode(tiny_tokenizer(), rows))
    shared = tiny_tokenizer()

    def work(_):
        return list(encode(tiny_tokenizer() if own_tokenizer else shared, rows))

    with ThreadPoolExecutor(6) as pool:
        assert all(found == alone for found in pool.map(work, range(12)))


@pytest.mark.parametrize("own_model", [False, True])
def test_threads_collect_as_one_thread_does(own_model):
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    jobs = [SAFETY, UTILITY] * 6
    models = [tiny_llama() if own_model else model for _ in jobs]

    def collect(rows, model=model):
        return gk.collect_gradients(model, tokenizer, rows, progress=False)

    alone = {id(rows): collect(rows) for rows in (SAFETY, UTILITY)}
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    with ThreadPoolExecutor(4) as pool:
        for rows, found in zip(jobs, pool.map(collect, jobs, models), strict=True):
            expected = alone[id(rows)]
            assert found.loss == expected.loss
            assert all(torch.equal(found[name].dense(), expected[name].dense()) for name in expected)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0])
        assert weight.requires_grad == before[name][1]
        assert not weight._backward_hooks


def exit_of(child, seconds=30):
    """Return the status with which a child ends; a child that waits for ever is killed and fails the test."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return pytest.fail("the child waits for ever")


def forked(action):
    child = os.fork()
    if child == 0:
        try:
            os._exit(action())
        except BaseException:  # noqa: BLE001, RUF100 - a child must never go on as a second test run
            sys.excepthook(*sys.exc_info())
        os._exit(99)
    return exit_of(child)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that does not fork")
def test_a_fork_while_another_thread_collects_does_not_wait_for_ever():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    fresh, other = tiny_llama(), tiny_tokenizer()
    expected = gk.collect_gradients(fresh, other, SAFETY, progress=False).loss
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_):
        inside.set()
        go_on.wait(60)

    handle = model.lm_head.register_forward_hook(pause)
    thread = threading.Thread(
        target=gk.collect_gradients, args=(model, tokenizer, SAFETY), kwargs={"progress": False}, daemon=True
    )
    thread.start()
    assert inside.wait(60)

    def collect_anew():
        return int(gk.collect_gradients(fresh, other, SAFETY, progress=False).loss != expected)

    def collect_the_same():
        try:
            gk.collect_gradients(model, tokenizer, SAFETY, progress=False)
        except CollectionError as error:
            return 7 if "in a forked process load the model anew" in str(error) else 1
        return 2

    try:
        assert forked(collect_anew) == 0
        assert forked(collect_the_same) == 7
    finally:
        go_on.set()
        thread.join(60)
        handle.remove()
    assert gk.collect_gradients(model, tokenizer, SAFETY, progress=False).loss == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that does not fork")
def test_a_fork_while_another_thread_renders_does_not_wait_for_ever(monkeypatch):
    from geomkit.inputs import templates

    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with templates._LOCK.held():
            inside.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert inside.wait(60)
    try:
        assert forked(lambda: len(encode(tiny_tokenizer(), SAFETY))) == len(SAFETY)
    finally:
        go_on.set()
        thread.join(60)
