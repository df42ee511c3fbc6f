# SPDX-License-Identifier: Apache-2.0
"""A batch that stops half-way, by an op that fails or by Ctrl-C: of every parameter the sum and its weight are of the same samples."""

import math
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfast as ff

I, C, N = 5, 3, 12


def network():
    return nn.Sequential(nn.Linear(I, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, C))


def asked_for(structure, model, data):
    likelihood = "gaussian" if data[0][1].is_floating_point() else "categorical"
    return (
        ff.EKFAC(basis=ff.fisher(model, data, "kfac", "empirical", likelihood, progress=False))
        if structure == "ekfac"
        else structure
    )


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_an_op_that_fails_adds_neither_samples_nor_their_number(structure):
    """Every batch is the same, so every mean over whole batches is the same."""
    model, x, y = network(), torch.randn(N, I), torch.randn(N, C)  # whose score takes no op
    asked = asked_for(structure, model, [(x, y)])
    whole = ff.fisher(model, [(x, y)], asked, "empirical", "gaussian", progress=False)

    nowhere = ff.backend("cuda")  # no op can run there

    def data():
        yield x, y
        nowhere.__enter__()
        yield x, y

    try:
        with pytest.raises(ff.BackendError, match="'cuda' was asked for but cannot run here") as caught:
            ff.fisher(model, data(), asked, "empirical", "gaussian", progress=False)
    finally:
        nowhere.__exit__(None, None, None)
    for name, expected in whole.diagonal().items():
        assert torch.allclose(caught.value.fisher.diagonal()[name], expected, rtol=1e-5), name


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_a_run_goes_on_after_an_op_that_failed(structure):
    model, x, y = network(), torch.randn(N, I), torch.randint(0, C, (N,))
    whole = ff.fisher(model, [(x, y)], structure, "empirical", progress=False)
    with ff.collect(model, structure) as stats:
        for fails in (False, True, False):
            loss = F.cross_entropy(model(x), y, reduction="none")
            if fails:
                with pytest.raises(ff.BackendError, match="'cuda' was asked for but cannot run here"), ff.backend("cuda"):
                    stats.backward(loss)
            else:
                stats.backward(loss)
    for name, expected in whole.diagonal().items():
        assert torch.allclose(stats.result().diagonal()[name], expected, rtol=1e-5), name


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_ctrl_c_wherever_it_comes(structure):
    model = nn.Sequential(nn.Linear(200, 400), nn.Tanh(), nn.Linear(400, 10))
    x, y = torch.randn(256, 200), torch.randint(0, 10, (256,))
    asked = asked_for(structure, model, [(x, y)])
    whole = ff.fisher(model, [(x, y)], asked, "empirical", progress=False)
    for n in range(12):
        seen = threading.Event()

        def interrupt(after=0.03 + 0.011 * n, seen=seen):
            while not seen.wait(after):  # again where Python dropped it: it does in a destructor
                signal.raise_signal(signal.SIGINT)
                after = 2.0

        thread = threading.Thread(target=interrupt)

        def data(thread=thread):
            thread.start()
            while True:
                yield x, y

        with pytest.raises(ff.Interrupted) as caught:
            ff.fisher(model, data(), asked, "empirical", progress=False)
        seen.set()
        thread.join()
        F_ = caught.value.fisher
        if F_.num_samples:
            for name, expected in whole.diagonal().items():
                assert torch.allclose(F_.diagonal()[name], expected, rtol=1e-4, atol=1e-9), name


def test_other_batches_are_other_data(tmp_path):
    model, x = network(), torch.randn(60, I)
    path = tmp_path / "run.safetensors"

    def stops():
        yield from ((part, None) for part in x[:30].split(10))
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        ff.fisher(model, stops(), checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=r"data must come in the batches that .* was made of, got 60 samples in the first 3"):
        ff.fisher(model, [(part, None) for part in x.split(20)], checkpoint=path, progress=False)


class Writes(nn.Module):
    """Halves its inputs in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(I, C)

    def forward(self, x):
        return self.layer(x.div_(2.0))


def test_what_reads_data_again_reads_them_as_they_were():
    model, x, y = Writes(), torch.randn(N, I), torch.randint(0, C, (N,))
    data, before = [(x, y)], x.clone()
    operator = ff.FisherOperator(model, data, "empirical")
    v = torch.ones(operator.num_parameters)
    assert torch.equal(operator @ v, operator @ v)
    assert ff.mean_loss(model, data) == ff.mean_loss(model, data)
    assert torch.equal(x, before)


def test_the_largest_traces_have_a_plot(tmp_path):
    for value in (3e18, 1e37, 1e100):
        mean = {"a.weight": torch.full((3,), value, dtype=torch.float64), "b.weight": torch.ones(3, dtype=torch.float64)}
        traces, spectrum = ff.DiagonalFisher(mean, num_samples=10).plot(tmp_path / "x.png").axes
        (low, high), (_, top) = traces.get_xlim(), spectrum.get_ylim()
        assert 0 < low < 3 and 3 * value < high < math.inf and value < top < math.inf
        assert [label.get_text() for label in traces.get_yticklabels()] == ["a", "b"]


def test_a_name_that_files_keep_for_themselves(tmp_path):
    with pytest.raises(ValueError, match="names must differ from '__metadata__'"):
        ff.DiagonalFisher({"__metadata__": torch.ones(3)}, num_samples=10).save(tmp_path / "f")
