"""What a replayed step gives back; the graph itself is played by a stand-in that calls again."""

import contextlib

import pytest
import torch

from musicscope.embedded.pretraining.cuda_graph import Graph


class Stream:
    def wait_stream(self, other):
        """Order of streams means nothing on a CPU."""


@pytest.fixture
def stand_in(monkeypatch):
    """torch.cuda that records calls of `run` and repeats them into the same tensors."""
    recording = []

    class Recorder:
        def replay(self):
            run, inputs, parameters, gradients, result = self.held
            before = [p.grad for p in parameters]
            result.copy_(run(*inputs))
            for kept, parameter, old in zip(gradients, parameters, before, strict=True):
                kept.copy_(parameter.grad)
                parameter.grad = old

    @contextlib.contextmanager
    def graph(recorder):
        yield
        recording.append(recorder)

    for name, value in {
        "Stream": Stream, "current_stream": Stream, "CUDAGraph": Recorder, "graph": graph,
        "stream": lambda _: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def record(run, inputs, parameters):
        made = Graph(run, inputs, parameters)
        recording[-1].held = (run, made.inputs, parameters, made.gradients, made.result)
        return made

    return record


def test_each_graph_leaves_the_gradients_of_its_own_inputs(stand_in):
    weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    calls = []

    def run(x):
        calls.append(len(x))
        weight.grad = None
        loss = (weight * x.sum(0)).sum()
        loss.backward()
        return loss.detach()

    short = stand_in(run, (torch.ones(1, 2),), [weight])
    assert calls == [1] * (Graph.WARM_UP + 1)
    long = stand_in(run, (torch.ones(4, 2),), [weight])

    given = torch.tensor([[5.0, 7.0]])
    assert short(given).item() == 2 * 5 + 3 * 7
    assert weight.grad.tolist() == [5.0, 7.0]
    assert long(torch.ones(4, 2) * 2).item() == 5 * 8
    assert weight.grad.tolist() == [8.0, 8.0]
    assert short(given * 2).item() == 2 * 10 + 3 * 14
    assert weight.grad.tolist() == [10.0, 14.0]
    assert given.tolist() == [[5.0, 7.0]]


def test_inputs_of_another_shape_or_number_are_refused(stand_in):
    made = stand_in(lambda x: x.sum(), (torch.ones(3),), [])
    with pytest.raises(RuntimeError):
        made(torch.ones(4))
    with pytest.raises(ValueError, match="zip"):
        made(torch.ones(3), torch.ones(3))
