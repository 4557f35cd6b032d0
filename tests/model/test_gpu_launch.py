"""What a GPU is given to do, done by the CPU at once: steps launched ahead, tokens read by row, layers told of."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama, runner_of

from kvasir_engine.executor.gpu_launcher import GpuLauncher
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.model.layers.basic import Head
from kvasir_engine.protocol import LogitsProcessors, Sampling
from kvasir_engine.sampling.device_sampler import queue_sample
from kvasir_engine.sampling.sampler import SampleRequest, sample
from kvasir_engine.sampling.token_history import TokenHistory

CPU = torch.device("cpu")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


@dataclass
class Mark:
    """An event of a device that has always come to it. `now` is its clock, in milliseconds."""

    now: list[float]
    reached: threading.Event = field(default_factory=threading.Event)
    at: float = -1.0

    def record(self) -> None:
        self.at = self.now[0]

    def synchronize(self) -> None:
        assert self.at >= 0, "waited for before it was recorded"
        self.reached.wait()

    def elapsed_time(self, other: "Mark", /) -> float:
        return other.at - self.at


def device(now: list[float], *, reached: bool = True) -> "tuple[list[Mark], object]":
    marks: list[Mark] = []

    def event() -> Mark:
        marks.append(Mark(now))
        if reached:
            marks[-1].reached.set()
        return marks[-1]

    return marks, event


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return runner_of(llama(), Path(tmp_path_factory.mktemp("llama")))


def launcher_of(runner: ModelRunner, event: object) -> GpuLauncher:
    return GpuLauncher(runner._model, runner._attention, CPU, runner.config.layers, event)  # type: ignore[arg-type]


def prompt_batch() -> ForwardBatch:
    table = torch.arange(12).view(3, 4)
    return ForwardBatch(
        torch.tensor([token for prompt in PROMPTS for token in prompt]),
        torch.cat([torch.arange(len(prompt)) for prompt in PROMPTS]),
        [len(prompt) for prompt in PROMPTS],
        [len(prompt) for prompt in PROMPTS],
        table,
    )


def decode_batch(order: list[int], step: int, rows: dict[int, int]) -> ForwardBatch:
    """The step-th decode of these prompts, each of whose tokens the step before sampled in its row."""
    positions = [len(PROMPTS[i]) + step for i in order]
    return ForwardBatch(
        torch.zeros(len(order), dtype=torch.int64),
        torch.tensor(positions),
        [1] * len(order),
        [position + 1 for position in positions],
        torch.arange(12).view(3, 4)[order],
        tuple((place, rows[i]) for place, i in enumerate(order)),
    )


def requests(order: list[int], step: int) -> list[SampleRequest]:
    how = [
        Sampling(9),
        Sampling(9, temperature=0.8, top_p=0.9, seed=5),
        Sampling(9, temperature=1.2, top_k=20, seed=6),
    ]
    return [SampleRequest(how[i], len(PROMPTS[i]) + step, step) for i in order]


def generate(launch: object, ahead: bool) -> dict[int, list[int]]:
    """Three steps, each in another order. `ahead`: all are launched before any is waited for."""
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    steps, rows = [], {}
    for step, order in enumerate([[0, 1, 2], [2, 0, 1], [1, 2]]):
        batch = prompt_batch() if step == 0 else decode_batch(order, step - 1, rows)
        launched = launch(batch, list(range(len(order))), requests(order, step))  # type: ignore[operator]
        rows = {i: row for row, i in enumerate(order)}
        steps.append((order, launched))
        if not ahead:
            launched.wait()
    for order, launched in steps:
        for i, token in zip(order, launched.wait().tokens, strict=True):
            tokens[i].append(token)
    return tokens


def test_steps_launched_ahead_sample_the_tokens_of_steps_one_by_one(runner: ModelRunner) -> None:
    _, event = device([0.0])
    right = generate(runner.launch, ahead=False)
    runner.pool.tensor.zero_()
    assert generate(launcher_of(runner, event).launch, ahead=True) == right
    assert len({tuple(each) for each in right.values()}) == 3


PROCESSORS = [
    LogitsProcessors(frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=3.0),
    LogitsProcessors(bad_words=[[token, token] for token in range(64)], logit_bias=[(3, 9.0), (4, 8.5)]),
    LogitsProcessors(frequency_penalty=2.0, allowed_token_ids=[5, 6, 7]),
]


def penalized(launch: object, lag: int) -> dict[int, list[int]]:
    """Four steps with processors, the tokens of the last `lag` of them unknown when the next is launched."""
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    histories = [TokenHistory(asked, len(prompt)) for asked, prompt in zip(PROCESSORS, PROMPTS, strict=True)]
    steps, rows = [], {}

    def collect(leave: int) -> None:
        while len(steps) > leave:
            order, launched = steps.pop(0)
            for i, token in zip(order, launched.wait().tokens, strict=True):
                tokens[i].append(token)

    for step, order in enumerate([[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]]):
        batch = prompt_batch() if step == 0 else decode_batch(order, step - 1, rows)
        asked = [
            SampleRequest(
                Sampling(9, processors=PROCESSORS[i]),
                len(PROMPTS[i]) + step,
                step,
                histories[i].work([*PROMPTS[i], *tokens[i]], rows[i] if step > len(tokens[i]) else None),
            )
            for i in order
        ]
        steps.append((order, launch(batch, [0, 1, 2], asked)))  # type: ignore[operator]
        rows = {i: row for row, i in enumerate(order)}
        collect(lag)
    collect(0)
    return tokens


def test_processors_count_a_token_that_only_the_device_knows(runner: ModelRunner) -> None:
    _, event = device([0.0])
    right = penalized(runner.launch, 0)
    assert right[1] != [3, 3, 3, 3]
    assert all(token in (5, 6, 7) for token in right[2])
    for launch in (runner.launch, launcher_of(runner, event).launch):
        runner.pool.tensor.zero_()
        assert penalized(launch, 1) == right
    assert len(set(right[0])) == 4


def test_only_the_rows_asked_for_are_sampled(runner: ModelRunner) -> None:
    _, event = device([0.0])
    launcher = launcher_of(runner, event)
    whole = launcher.launch(prompt_batch(), [0, 1, 2], requests([0, 1, 2], 0)).wait().tokens
    assert launcher.launch(prompt_batch(), [2], requests([2], 0)).wait().tokens == whole[2:]
    assert launcher.launch(prompt_batch(), [], []).wait().tokens == []


def test_each_layer_is_told_of_in_order_once_the_device_has_come_to_it_and_before_the_step_has_ended(
    runner: ModelRunner,
) -> None:
    marks, event = device([0.0], reached=False)
    told: list[int] = []
    first = threading.Event()

    def on_layer(layer: int) -> None:
        told.append(layer)
        first.set()

    step = launcher_of(runner, event).launch(prompt_batch(), [0], requests([0], 0), on_layer)
    assert told == []
    layers = marks[2:]  # after the step's beginning and its end, which are made first
    assert len(layers) == runner.config.layers
    layers[0].reached.set()
    assert first.wait(60)
    assert told == [0]
    for mark in marks:
        mark.reached.set()
    step.wait()
    assert told == list(range(runner.config.layers))


def test_the_gap_is_the_devices_time_from_one_steps_end_to_the_next_ones_beginning(runner: ModelRunner) -> None:
    now = [0.0]
    _, event = device(now)
    launcher = launcher_of(runner, event)
    first = launcher.launch(prompt_batch(), [0, 1, 2], requests([0, 1, 2], 0))
    now[0] = 250.0
    second = launcher.launch(prompt_batch(), [0, 1, 2], requests([0, 1, 2], 0))
    first.wait()
    second.wait()
    assert (first.gap, second.gap) == (None, 0.25)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            Sampling,
            max_tokens=st.just(9),
            temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
            top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
            top_k=st.sampled_from([0, 1, 7, 500]),
            min_p=st.sampled_from([0.0, 0.05, 0.5]),
            seed=st.integers(0, 1 << 64),
            min_tokens=st.sampled_from([0, 3]),
            stop_token_ids=st.sampled_from([[], [1, 2], [7]]),
            logprobs=st.sampled_from([None, 0, 3]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 1000),
    st.booleans(),
)
def test_what_is_sampled_in_the_queue_is_what_sampling_at_once_samples(
    how: list[Sampling], seed: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(how), 97, generator=generator) * 3
    if ties:
        logits = logits.round()
    rows = [SampleRequest(each, 11 + i, i) for i, each in enumerate(how)]
    right, ours = sample(logits, rows), queue_sample(logits, rows)
    assert ours.tokens.tolist() == right.tokens
    assert ours.collect() == right


def test_rivals_of_the_likeliest_token_are_told_apart_alike_without_a_wait() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 64).bfloat16()
    weight[50:54] = weight[7] * 1.001  # next to equal
    head = Head(weight)
    x = torch.randn(5, 64)
    x[2] = weight[7].float()
    rough = torch.nn.functional.linear(x.bfloat16(), weight).float()
    right, ours = rough.clone(), rough.clone()
    head.settle(x, right)
    head.settle_queued(x, ours)
    assert torch.equal(right.argmax(-1), ours.argmax(-1))
    torch.testing.assert_close(ours, right)
    assert not torch.equal(rough, right)
