"""Calls, compiles, shrinks and training in several threads: each as if it were the only one."""

import copy
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn

import ecospa_fx
from ecospa_fx.threads import alone, in_call, is_alone


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 3)).eval()


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def generator(seed):
    return torch.Generator().manual_seed(seed)


ROWS = [torch.randn(rows, 4, generator=generator(rows)) for rows in (1, 2, 3, 5)] * 3
IMAGES = [torch.randn(rows, 3, side, side, generator=generator(side)) for rows in (1, 2) for side in (6, 8, 9)] * 2
TOKENS = [torch.randint(32, (rows, long), generator=generator(long)) for rows in (1, 2) for long in (1, 3, 7)] * 2


def run(model, x):
    return model(x)


KINDS = {
    "blocks": (stack, ROWS, run),
    "the root": (convolutions, IMAGES, run),
    "generation": (gpt2, TOKENS, lambda model, x: model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0)),
}


def in_threads(function, values, count=6):
    def of(value):
        with torch.no_grad():
            return function(value)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(of, values))


@pytest.mark.parametrize("state", ["new", "shrunk", "loaded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_calls_from_several_threads(kind, state, tmp_path):
    """Each call of a new kind captures, while others are served; the first does with all waiting for it."""
    make, inputs, serve = KINDS[kind]
    plain = model = ecospa_fx.compile(make())
    if state == "new":
        plain = make()
    else:
        serve(model, inputs[0])
        halves = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model) if c.kind != "heads"}
        ecospa_fx.shrink(model, halves)
        plain = copy.deepcopy(model)
    if state == "loaded":
        ecospa_fx.save(model, tmp_path)
        model = ecospa_fx.load(tmp_path, None if kind == "generation" else make).eval()
    served = in_threads(lambda x: serve(model, x), inputs)
    with torch.no_grad():
        for x, result in zip(inputs, served, strict=True):
            torch.testing.assert_close(result, serve(plain, x))


def train(seed):
    """A run with numbers of its own; what it ends with."""
    numbers, model = generator(seed), stack().train()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=numbers) / 4)
    ecospa_fx.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=0.7, start=2, interval=2, end=8, policy="adaptive" if seed % 2 else "paper"
    )
    for _ in range(10):
        loss = model(torch.randn(16, 4, generator=numbers)).square().mean()
        loss.backward()
        optimizer.step()
        trainer.step(loss=loss)
        optimizer.zero_grad()
    assert trainer.done
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_several_models_train_at_once():
    for alone_, together in zip(map(train, range(3)), in_training_threads(range(3)), strict=True):
        torch.testing.assert_close(together, alone_, rtol=0, atol=0)


def in_training_threads(seeds):
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(train, seeds))


def test_plain_models_run_beside_a_compile():
    """Of the same classes too, whose registers of functions and globals are the same objects."""
    plain, ids, ended, results = gpt2(), TOKENS[2], threading.Event(), []
    with torch.no_grad():
        expected = plain(input_ids=ids).logits

    def serve():
        with torch.no_grad():
            while not ended.is_set():
                try:
                    results.append(plain(input_ids=ids).logits)
                except Exception as error:  # of any kind, to be seen below
                    results.append(error)
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        # Not by root, whose Python sets an attribute of a global of transformers, as the other thread does meanwhile.
        ecospa_fx.compile(gpt2(), example_kwargs={"input_ids": ids, "use_cache": False}, regions="blocks")
    finally:
        ended.set()
        thread.join()
    assert results and all(isinstance(each, torch.Tensor) and torch.allclose(each, expected) for each in results)


def train_plain():
    """Of plain torch: its optimizers compute otherwise where torch says that it is compiling."""
    numbers, model = generator(0), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=numbers))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        model(torch.randn(16, 4, generator=numbers)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def call_compiled():
    """A function that torch.compile has compiled refuses to be called where torch says that it is tracing."""
    compiled_code = torch.compile(nn.Linear(4, 4), backend="eager")
    for _ in range(300):
        compiled_code(ROWS[3])
    return []


@pytest.mark.parametrize("job", [train_plain, call_compiled])
def test_other_threads_do_not_hear_that_torch_is_exporting(job):
    expected = job()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(job)
        while not other.done():
            ecospa_fx.compile(stack(), example_inputs=(ROWS[3],))
    torch.testing.assert_close(other.result(), expected, rtol=0, atol=0)


def test_a_model_is_explained_while_it_is_served():
    model, x, ended, results = stack(), ROWS[3], threading.Event(), []
    expected = model(x)

    def serve():
        while not ended.is_set():
            results.append(model(x))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        text = str(ecospa_fx.explain(model, example_inputs=(x,)))
    finally:
        ended.set()
        thread.join()
    assert "ffn" in text and all(torch.allclose(each, expected) for each in results)


def test_a_model_shrinks_while_it_is_served():
    """Each call runs at the sizes of before or of after."""
    model, x, ended, results = ecospa_fx.compile(stack(), example_inputs=(ROWS[3],)), ROWS[3], threading.Event(), []
    first = next(c for c in ecospa_fx.couplings(model) if c.kind == "ffn")
    with torch.no_grad():
        expected = [model(x)]
        small = copy.deepcopy(model)
        for size in (12, 8, 4):
            ecospa_fx.shrink(small, {first.name: torch.arange(size)})
            expected.append(small(x))

    def serve():
        with torch.no_grad():
            while not ended.is_set():
                results.append(model(x))

    serving = [threading.Thread(target=serve) for _ in range(2)]
    for thread in serving:
        thread.start()
    for size in (12, 8, 4):
        reached = len(results) + 5
        while len(results) < reached and all(thread.is_alive() for thread in serving):
            time.sleep(0)
        ecospa_fx.shrink(model, {first.name: torch.arange(size)})
    ended.set()
    for thread in serving:
        thread.join()
    assert len(results) >= 15 and all(any(torch.allclose(each, one) for one in expected) for each in results)


def test_who_is_alone_waits_for_calls_and_they_for_it():
    order, inside, waits = [], threading.Event(), threading.Event()

    def serve():
        with in_call():
            inside.set()
            waits.wait()
            order.append("called")
        with in_call():
            order.append("called again")

    thread = threading.Thread(target=serve)
    thread.start()
    inside.wait()
    threading.Timer(0.05, waits.set).start()  # by then this thread waits, or has not begun to: both will do
    with in_call(), alone():  # a call of this thread does not count
        assert is_alone()
        assert order in (["called"], ["called", "called again"])
        known = list(order)
        with alone():
            order.append("changed")
        assert order == [*known, "changed"]
    thread.join()
    assert sorted(order) == ["called", "called again", "changed"] and not is_alone()


def test_a_call_that_began_waits_for_who_is_alone():
    """The other way round: a thread that has made calls before, and one that never has."""
    order, known, go = [], threading.Event(), threading.Event()

    def serve(first):
        if not first:
            with in_call():
                known.set()
        go.wait()
        with in_call():
            order.append("called")

    serving = [threading.Thread(target=serve, args=(first,)) for first in (False, True)]
    for thread in serving:
        thread.start()
    known.wait()
    with alone():
        go.set()
        time.sleep(0.05)
        order.append("changed")
    for thread in serving:
        thread.join()
    assert order == ["changed", "called", "called"]


def test_two_that_are_in_calls_may_both_be_alone():
    """Each waits inside of a call, which must not keep the other waiting."""
    ready, order = threading.Barrier(2), []

    def change(number):
        with in_call():
            ready.wait()
            with alone():
                order.append(number)
                order.append(number)
            order.append("after")

    both = [threading.Thread(target=change, args=(number,)) for number in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    numbers = [each for each in order if each != "after"]
    assert numbers in ([0, 0, 1, 1], [1, 1, 0, 0]) and len(order) == 6


def test_a_forked_process_is_by_itself():
    """As a loader's worker is, which may call the model while another thread of its parent was alone."""
    inside, over = threading.Event(), threading.Event()

    def change():
        with alone():
            inside.set()
            over.wait()

    thread = threading.Thread(target=change)
    thread.start()
    inside.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that the parent has threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        with in_call(), alone():
            os._exit(7)
    over.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
