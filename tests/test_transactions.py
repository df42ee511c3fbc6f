# SPDX-License-Identifier: Apache-2.0
"""A batch that fails leaves no trace: not in a parameter that comes part by part, not by squares that overflow."""

import signal

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.accumulator import RunningSum
from fisherfast.fisher.blocks import eigen_sums
from fisherfast.fisher.blocks.block_sums import BatchSum
from fisherfast.fisher.blocks.few_rows import FewRows
from fisherfast.fisher.engine import Engine
from fisherfast.fisher.run import checkpoint, interrupts

ASKED = {
    "diagonal": "diagonal",
    "exact block": (ff.KFAC(max_exact_dim=256),),
    "diagonal of kfac": (ff.KFAC(max_exact_dim=0),),
    "moments": (ff.GradientMoments(),),
}


class Sick(torch.autograd.Function):
    """The identity, with a gradient that is NaN where ``sick`` is true."""

    @staticmethod
    def forward(ctx, x, sick):
        ctx.sick = sick
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.masked_fill(torch.as_tensor(ctx.sick), float("nan")), None


class Parts(nn.Module):
    """A parameter used in two parts, each for itself."""

    def __init__(self):
        super().__init__()
        self.p, self.head = nn.Parameter(torch.rand(6)), nn.Linear(3, 4)
        self.sick = (False, False)

    def forward(self, x):
        """[N, 2, 3] to [N, 4]."""
        a, b = self.p[:3], self.p[3:]
        return self.head(Sick.apply(x[:, 0] * a, self.sick[0]) + Sick.apply(x[:, 1] * b, self.sick[1]))


def measure(model, batches, asked):
    result = ff.fisher(model, batches, asked, "empirical", progress=False)
    return result[0] if isinstance(result, tuple) else result


def numbers(result, name):
    return result.variance()[name] if isinstance(result, ff.SampleMoments) else result.diagonal()[name]


@pytest.mark.parametrize("sick", [(True, False), (False, True)], ids=["first", "second"])
@pytest.mark.parametrize("asked", ASKED)
def test_a_parameter_in_parts_counts_whole_batches(asked, sick):
    model, x, y = Parts(), torch.randn(5, 2, 3), torch.arange(5) % 4
    before = measure(model, [(x, y)], ASKED[asked])

    def batches():
        yield x, y
        model.sick = sick
        yield 3 * torch.randn(5, 2, 3), y

    with pytest.raises(ff.NonFiniteError, match="'p'") as caught:
        measure(model, batches(), ASKED[asked])
    found = caught.value.fisher
    torch.testing.assert_close(numbers(found, "p"), numbers(before, "p"))
    assert found.num_samples == before.num_samples == 5


@pytest.mark.parametrize("asked", ["diagonal", "diagonal of kfac"])
def test_parts_are_added_as_ever(asked):
    model, x, y = Parts().double(), torch.randn(6, 2, 3).double(), torch.arange(6) % 4
    squares = sum(
        torch.autograd.grad(nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), model.p)[0] ** 2 for n in range(6)
    )
    found = measure(model, [(x[:2], y[:2]), (x[2:], y[2:])], ASKED[asked])
    torch.testing.assert_close(found.diagonal(dtype=torch.float64)["p"], squares / 6)


def test_squares_that_overflow_are_an_error_that_names_the_layer():
    model, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), torch.arange(5) % 4
    x = torch.randn(5, 3)
    model[0].weight.data[:, 0] = 0  # what is large in the input is not seen in the output
    large = x.clone()
    large[:, 0] = 1e25
    with pytest.raises(ff.NonFiniteError, match=r"so must their squares, got NaN or infinity, first at '0\.weight'") as caught:
        measure(model, [(x, y), (large, y)], "diagonal")
    found = caught.value.fisher
    assert found.num_samples == 5
    with pytest.raises(ValueError, match=r"0\.weight: must have samples of a weight > 0"):
        found.trace()
    sums = found.accumulators()
    assert sums["2.weight"].weight == 10 and sums["2.weight"].sum.isfinite().all()  # of a layer whose squares fit


def test_squares_that_overflow_in_a_staged_batch_are_dropped(tmp_path):
    model, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), torch.arange(5) % 4
    x = torch.randn(5, 3)
    model[0].weight.data[:, 0] = 0
    before = measure(model, [(x, y)], "diagonal")
    large = x.clone()
    large[:, 0] = 1e25
    with pytest.raises(ff.NonFiniteError, match="gradients must be finite") as caught:
        ff.fisher(model, [(x, y), (large, y)], fisher_type="empirical", progress=False, checkpoint=tmp_path / "c")
    assert caught.value.fisher.trace() == pytest.approx(before.trace())


class Last(nn.Module):
    """A layer of which some output gradients are NaN where asked: those of the last sample, or of the last channel."""

    def __init__(self, layer, sick):
        super().__init__()
        self.layer, self.sick, self.fails = layer, sick, False

    def forward(self, x):
        out = Sick.apply(self.layer(x), self.sick if self.fails else False)
        return out if out.dim() == 2 else out.mean(2)


SAMPLE, CHANNEL = torch.arange(6).view(6, 1) == 5, torch.arange(4).view(1, 4, 1) == 3


@pytest.mark.parametrize("chunk", [1, 2**24], ids=["chunks", "whole"])
@pytest.mark.parametrize(
    ("asked", "layer", "shape", "sick"),
    [
        (ff.EKFAC, lambda: nn.Linear(5, 4), (5,), SAMPLE),
        (ff.EKFAC, lambda: nn.Conv1d(4, 4, 3, groups=2), (4, 6), CHANNEL),
        (ff.EKFAC, lambda: nn.Conv1d(4, 4, 3, groups=2), (4, 6), SAMPLE.unsqueeze(2)),
        (ff.KFAC, lambda: nn.Conv1d(4, 4, 3, groups=2), (4, 6), CHANNEL),
    ],
    ids=["ekfac-samples", "ekfac-groups", "ekfac-images", "reduce-groups"],
)
def test_a_batch_that_is_added_in_several_parts_adds_none_if_one_is_not_finite(asked, layer, shape, sick, chunk, monkeypatch):
    monkeypatch.setattr(eigen_sums, "_CHUNK_BYTES", chunk)
    model, x, y = Last(layer(), sick), torch.randn(9, *shape), torch.arange(9) % 4
    basis = measure(model, [(x, y)], "kfac") if asked is ff.EKFAC else None
    request = (ff.KFAC(sharing="reduce") if basis is None else ff.EKFAC(basis=basis),)
    before = measure(model, [(x[:3], y[:3])], request)

    def batches():
        yield x[:3], y[:3]
        model.fails = True
        yield x[3:], y[3:]

    with pytest.raises(ff.NonFiniteError) as caught:
        measure(model, batches(), request)
    found = caught.value.fisher
    of_gradients = [F.blocks[0].B if basis is None else F.blocks[0].values for F in (before, found)]
    torch.testing.assert_close(*(sums.mean() for sums in of_gradients))


class Unseen(torch.autograd.Function):
    """``x * p``, which no rule covers and vmap cannot take: its sample gradients come one by one."""

    @staticmethod
    def forward(ctx, x, p, sick):
        ctx.save_for_backward(x, p)
        ctx.sick = sick
        return x * p

    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        return g * p, (g * x).sum(0) * (float("nan") if ctx.sick else 1), None


class Looped(nn.Module):
    """Fails where asked when a sample comes alone whose inputs are all ``ILL``: with an error, or with a gradient that is NaN."""

    ILL = 9.0

    def __init__(self):
        super().__init__()
        self.p, self.head, self.fails = nn.Parameter(torch.rand(4)), nn.Linear(4, 3), None

    def forward(self, x):
        ill = len(x) == 1 and bool((x == self.ILL).all())
        if ill and self.fails is OSError:
            raise OSError("the sample is ill")
        return self.head(Unseen.apply(x, self.p, ill and self.fails is ff.NonFiniteError))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("error", [OSError, ff.NonFiniteError])
@pytest.mark.parametrize("asked", ["diagonal", "exact block", "diagonal of kfac"])
def test_of_a_loop_that_is_broken_off_the_samples_that_came_count(asked, error, weighted):
    model, x, y = Looped().double(), torch.randn(9, 4).double(), torch.arange(9) % 3
    x[8] = Looped.ILL
    weight = torch.arange(1.0, 10.0) if weighted else torch.ones(9)
    squares = [
        torch.autograd.grad(nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), model.p)[0] ** 2 for n in range(8)
    ]
    model.fails = error
    data = [(x[some], y[some], *([weight[some]] if weighted else [])) for some in (slice(0, 3), slice(3, 9))]
    with pytest.raises(error) as caught:
        measure(model, data, ASKED[asked])
    expected = weight[:8].double() @ torch.stack(squares) / weight[:8].sum()
    torch.testing.assert_close(caught.value.fisher.diagonal(dtype=torch.float64)["p"], expected)


@pytest.mark.parametrize("staged", [False, True])
def test_few_rows_of_a_batch_that_does_not_count_are_none(staged):
    factor, rows = BatchSum((9, 9), torch.empty(())), torch.randn(2, 1, 9)
    factor.few_rows = FewRows(9)
    for batch, counts in zip(rows, (False, True), strict=True):
        factor.add_outer(factor.target(staged), batch)
        factor.settle(whole=counts, alone=False)
    assert torch.equal(factor.few_rows.rows(), rows[1])


def test_ctrl_c_between_the_passes_of_a_block_has_the_result():
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(0, 3, (5,))
    with pytest.raises(ff.Interrupted) as caught, ff.collect(model, "diagonal") as stats:
        stats.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
        raise KeyboardInterrupt
    assert caught.value.fisher.num_samples == 5


@pytest.mark.filterwarnings("error")
def test_a_warning_made_an_error_has_the_result():
    model = nn.Linear(4, 3).half()
    data = [(torch.full((8, 4), 1.0).half(), torch.zeros(8, dtype=torch.int64))]
    model.weight.data.zero_()
    model.bias.data.copy_(torch.tensor([10.5, 0, 0]))
    with pytest.raises(ff.FisherWarning, match="float16 gradients must not underflow") as caught:
        ff.fisher(model, data, fisher_type="empirical", progress=False)
    assert caught.value.fisher.num_samples == 8


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_ctrl_c_waits_until_a_result_is_made(structure, monkeypatch):
    """Half a fold of the sums would be in every later result."""
    folded = []

    def fold(sums):
        if not folded:
            signal.raise_signal(signal.SIGINT)
        whole(sums)
        folded.append(sums)

    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(0, 3, (5,))
    with ff.collect(model, structure) as stats:
        stats.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
    whole = RunningSum.fold
    monkeypatch.setattr(RunningSum, "fold", fold)
    with pytest.raises(KeyboardInterrupt):
        stats.result()
    assert folded
    assert stats.result().trace() == pytest.approx(measure(model, [(x, y)], structure).trace(), rel=1e-6)


def test_an_error_survives_a_result_for_which_there_is_no_room(monkeypatch):
    """The allocator's own error would hide what went wrong."""

    def no_room(sums):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def failing():
        yield torch.randn(5, 4), torch.zeros(5).long()
        monkeypatch.setattr(RunningSum, "snapshot", no_room)
        raise OSError("the data are gone")

    with pytest.raises(OSError, match="the data are gone") as caught:
        ff.fisher(nn.Linear(4, 3), failing(), progress=False)
    assert any("could not be kept: DefaultCPUAllocator" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    "error", [SystemExit(0), TimeoutError("late"), KeyboardInterrupt(), RuntimeError("can't allocate memory")], ids=repr
)
@pytest.mark.parametrize("at", [1, 4])
def test_a_batch_that_is_broken_off_while_it_is_counted_is_in_no_result(at, error, tmp_path, monkeypatch):
    """Some of the four parameters, or all, have it in their sums; the counts do not."""
    model, path = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), tmp_path / "run.safetensors"
    data = [(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(4)]
    whole, seen = Engine._counted, []

    def counted(engine, *args):
        whole(engine, *args)
        seen.append(args)
        if len(seen) == 2 * 4 + at:
            raise error

    monkeypatch.setattr(checkpoint, "_SECONDS", -1.0)
    monkeypatch.setattr(Engine, "_counted", counted)
    with pytest.raises(ff.Interrupted if isinstance(error, KeyboardInterrupt) else type(error)) as caught:
        ff.fisher(model, data, fisher_type="empirical", progress=False, checkpoint=path)
    monkeypatch.undo()
    assert not hasattr(caught.value, "fisher")
    if not isinstance(error, SystemExit):
        assert any("while it was counted" in note or "counted to its end" in note for note in caught.value.__notes__)
    torch.testing.assert_close(ff.load(path).diagonal(), measure(model, data[:2], "diagonal").diagonal())
    resumed = ff.fisher(model, data, fisher_type="empirical", progress=False, checkpoint=path)
    torch.testing.assert_close(resumed.diagonal(), measure(model, data, "diagonal").diagonal())


class Signals(torch.autograd.Function):
    """The identity, that sends the process signals in its backward pass."""

    @staticmethod
    def forward(ctx, x, signals):
        ctx.signals = signals
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        while ctx.signals:  # once, however often the batch is looked at
            signal.raise_signal(ctx.signals.pop())
        return g, None


@pytest.fixture
def handled():
    """Handlers as people write them."""

    def stop(number, frame):
        raise {signal.SIGTERM: SystemExit(0), signal.SIGALRM: TimeoutError("late")}[number]

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_signal_waits_until_its_batch_is_counted(checkpointed, number, handled, tmp_path):
    model, path = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), tmp_path / "run.safetensors"
    data = [(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(3)]
    expected = measure(model, data[:2], "diagonal").diagonal()

    def stopped():
        yield data[0]
        signals = [number]
        model[1].register_forward_hook(lambda module, args, out: Signals.apply(out, signals))
        yield data[1]

    raised = {signal.SIGINT: ff.Interrupted, signal.SIGTERM: SystemExit, signal.SIGALRM: TimeoutError}[number]
    with pytest.raises(raised) as caught:
        ff.fisher(model, stopped(), fisher_type="empirical", progress=False, checkpoint=path if checkpointed else None)
    if number != signal.SIGTERM:
        torch.testing.assert_close(caught.value.fisher.diagonal(), expected)
    if checkpointed:
        torch.testing.assert_close(ff.load(path).diagonal(), expected)


def test_a_third_signal_does_not_wait_and_leaves_no_result(handled, capfd):
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.arange(6) % 3
    signals = [signal.SIGALRM] * 3
    with ff.collect(model, "diagonal") as stats:
        stats.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
        model[1].register_forward_hook(lambda module, args, out: Signals.apply(out, signals))
        with pytest.raises(TimeoutError) as caught:
            stats.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
    assert not hasattr(caught.value, "fisher")
    assert "once more does not" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="must be counted to its end"):
        stats.result()


def test_a_second_signal_waits_and_says_so(handled, capfd):
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.arange(6) % 3
    expected = measure(model, [(x, y)], "diagonal").diagonal()
    with ff.collect(model, "diagonal") as stats:
        stats.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
        signals = [signal.SIGINT, signal.SIGINT]
        model[1].register_forward_hook(lambda module, args, out: Signals.apply(out, signals))
        with pytest.raises(KeyboardInterrupt) as caught:
            stats.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
    assert caught.value.fisher.num_samples == 12
    assert "once more does not" in capfd.readouterr().err
    torch.testing.assert_close(caught.value.fisher.diagonal(), expected)


def test_an_error_says_that_a_part_of_its_batch_may_have_counted():
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.arange(6) % 3
    with ff.collect(model, "diagonal") as stats:
        stats.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
        hook = model[1].register_forward_hook(lambda module, args, out: Sick.apply(out, True))
        with pytest.raises(ff.NonFiniteError, match="gradients must be finite") as caught:
            stats.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
        hook.remove()
        assert "count twice" in caught.value.__notes__[-1]
        assert caught.value.fisher.accumulators()["2.weight"].weight == 12  # which it has
        with pytest.raises(ff.NonFiniteError, match="the loss must be finite") as caught:
            stats.backward(float("nan") * nn.functional.cross_entropy(model(x), y, reduction="none"))
        assert not any("count twice" in note for note in caught.value.__notes__)


def test_a_handler_that_returns_is_called_from_the_third_signal_on_and_one_that_is_set_meanwhile_stays(capfd):
    heard, before = [], signal.getsignal(signal.SIGUSR1)
    try:
        signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
        with interrupts.deferred(pytest.fail):
            for _ in range(5):
                signal.raise_signal(signal.SIGUSR1)
            assert len(heard) == 3
        assert len(heard) == 3 and capfd.readouterr().err.count("SIGUSR1 waits") == 1
        with interrupts.deferred(pytest.fail):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_every_signal_is_delivered_and_its_handler_put_back_whatever_they_raise(handled):
    numbers, heard = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM), []

    def handler(number, frame):
        heard.append(number)
        raise TimeoutError(number)

    interrupt = signal.getsignal(signal.SIGINT)
    try:
        for number in numbers:
            signal.signal(number, handler)
        with pytest.raises(TimeoutError), interrupts.deferred(pytest.fail):
            for number in numbers:
                signal.raise_signal(number)
            assert not heard
        assert all(signal.getsignal(number) is handler for number in numbers)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert sorted(heard) == sorted(numbers)
