# SPDX-License-Identifier: Apache-2.0
"""Pooling is exact: the accumulators of parts, in any grouping, are that of the whole. (Ranks: test_fisher_pooling.)"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfast.accumulator import Accumulator, RunningSum

INTEGERS = st.integers(-(2**40), 2**40)
TRIPLES = st.lists(st.tuples(st.tuples(INTEGERS, INTEGERS, INTEGERS), st.integers(1, 2**20)), min_size=3, max_size=3)


def accumulator(entries, weight):
    return Accumulator(torch.tensor(entries, dtype=torch.float64), weight)


def assert_same(a, b):
    assert torch.equal(a.sum, b.sum) and a.weight == b.weight


@given(TRIPLES)
def test_pooling_is_associative_and_commutative(parts):
    a, b, c = (accumulator(*part) for part in parts)
    assert_same((a + b) + c, a + (b + c))
    assert_same(a + b, b + a)


@given(TRIPLES)
def test_pooling_equals_one_pass(parts):
    whole = Accumulator.zeros((3,))
    for entries, weight in parts:
        whole += accumulator(entries, weight)
    a, b, c = (accumulator(*part) for part in parts)
    assert_same(a + b + c, whole)
    assert torch.equal(whole.mean(), whole.sum / sum(weight for _, weight in parts))


def test_pooled_mean_weighs_by_samples():
    pooled = accumulator([6.0], 3) + accumulator([20.0], 2)
    assert pooled.mean().item() == 26 / 5  # the mean of the two means would be 6


def test_addition_changes_neither():
    a, b = accumulator([1.0, 2.0], 1), accumulator([10.0, 20.0], 4)
    assert_same(a + b, accumulator([11.0, 22.0], 5))
    assert_same(a, accumulator([1.0, 2.0], 1))
    assert_same(b, accumulator([10.0, 20.0], 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_small_sums_are_kept(dtype):
    total = accumulator([2.0**30], 0)
    for _ in range(64):
        total += Accumulator(torch.ones(1, dtype=dtype), 1)  # each would vanish beside 2**30 in float32
    assert_same(total, accumulator([2.0**30 + 64], 64))


def test_sum_is_kept_not_copied():
    total = torch.zeros(5, 3, dtype=torch.float64)
    assert Accumulator(total, 0).sum.data_ptr() == total.data_ptr()


def test_sum_is_float64_contiguous_and_without_gradient():
    source = torch.rand(3, 5, requires_grad=True)
    total = Accumulator(source.mT, 1).sum
    assert total.dtype == torch.float64 and total.is_contiguous() and not total.requires_grad
    assert torch.equal(total, source.detach().mT.double())


def test_mean_is_divided_before_it_is_cast():
    total = accumulator([2.0**128], 2**10)  # not a float32, its mean is
    assert total.mean(torch.float32).item() == 2.0**118
    assert total.mean().dtype == torch.float64


def test_rejects():
    with pytest.raises(ValueError, match="weight must be > 0 for a mean, got 0"):
        Accumulator.zeros((2,)).mean()
    with pytest.raises(TypeError, match=r"sum must be a floating tensor, got torch\.int64"):
        Accumulator(torch.ones(2, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match="sum must be a floating tensor, got list"):
        Accumulator([1.0], 1)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        Accumulator.zeros((2, 3)) + Accumulator.zeros((3, 2))
    with pytest.raises(TypeError, match="unsupported operand"):
        Accumulator.zeros((2,)) + 1.0


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_rejects_weight(weight):
    with pytest.raises(ValueError, match="weight must be a finite number >= 0"):
        Accumulator(torch.ones(2), weight)


def test_repr_shows_shape_and_weight():
    assert repr(Accumulator.zeros((2, 3))) == "Accumulator(shape=(2, 3), weight=0, device='cpu')"


def test_running_sum_loses_nothing_over_many_additions():
    """After 20,000 additions the sum is still within the rounding of one float32 number; a plain float32 sum is not."""
    running, exact, plain = RunningSum(torch.empty(7)), torch.zeros(7, dtype=torch.float64), torch.zeros(7)
    for _ in range(20_000):
        term = torch.rand(7)
        running.low.add_(term)
        plain.add_(term)
        running.counted(1)
        exact += term.double()
    relative = (running.snapshot().sum - exact).abs().max() / exact.max()
    assert relative < 2**-24 < (plain - exact).abs().max() / exact.max()
    assert running.snapshot().weight == 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("additions", [1, 64, 100])
def test_running_sum_continues_from_a_snapshot_bit_by_bit(dtype, additions):
    first, second = RunningSum(torch.empty(11, dtype=dtype)), RunningSum(torch.empty(11, dtype=dtype))
    for _ in range(additions):
        first.low.add_(torch.rand(11, dtype=dtype))
        first.counted(3)
    second.restore(first.snapshot())
    for running in (first, second):
        running.low.add_(torch.full((11,), 0.1, dtype=dtype))
        running.counted(3)
    assert torch.equal(first.snapshot().sum, second.snapshot().sum) and first.weight == second.weight


def test_a_running_sum_goes_on_from_all_digits_of_a_file():
    running, entries = RunningSum(torch.empty(2)), [2.0**30 + 1, -3.0 - 2.0**-30]
    running.restore(accumulator(entries, 4))  # files may hold float64
    assert_same(running.snapshot(), accumulator(entries, 4))


def test_a_short_run_takes_one_tensor_and_a_snapshot_is_that_tensor():
    running = RunningSum(torch.empty(5))
    low = running.low.add_(1)
    running.counted(1)
    assert running.high is None
    before = running.snapshot()
    assert before.parts == (low,) and before.nbytes == 20
    again = running.snapshot()
    assert torch.equal(again.sum, before.sum) and again.parts[0].data_ptr() != low.data_ptr()  # results share no memory
    running.low.add_(1)
    running.counted(1)
    assert (before.sum == 1).all() and (running.snapshot().sum == 2).all()


@given(
    st.lists(st.sampled_from(["add", "fold", "snapshot", "restore"]), max_size=40),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_snapshots_are_what_the_sum_was_whatever_follows(steps, dtype):
    """Terms of which some 40 bits are needed, so that both parts are used; every sum of them is exact."""
    running, exact, taken = RunningSum(torch.empty(3, dtype=dtype)), torch.zeros(3, dtype=torch.float64), []
    for number, step in enumerate(steps):
        if step == "add":
            term = torch.tensor([1.0, 2.0**30, 3.0 * 2**15]) * (number + 1)
            running.low.add_(term.to(dtype))
            running.counted(1)
            exact = exact + term.double()
            running.fold()  # low alone would round
        elif step == "fold":
            running.fold()
        else:
            taken.append((running.snapshot(), exact, running.weight))
            if step == "restore":
                running = RunningSum(torch.empty(3, dtype=dtype))
                running.restore(taken[-1][0])
    taken.append((running.snapshot(), exact, running.weight))
    for snapshot, then, weight in taken:
        assert torch.equal(snapshot.sum, then) and snapshot.weight == weight
        assert torch.equal(snapshot.nearest(torch.float32), then.float())


def in_parts():
    """An accumulator in two parts, and the same in float64."""
    high, low = torch.tensor([[1.0, 2.0**30, -3.0]]), torch.tensor([[2.0**-30, 1.0, 0.0]])
    return Accumulator.of_parts((high, low), 4), Accumulator(high.double() + low.double(), 4)


def test_parts_are_read_as_one_sum():
    parts, whole = in_parts()
    assert_same(parts, whole)
    assert (parts.shape, parts.device, parts.nbytes) == (whole.shape, whole.device, whole.nbytes)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(parts.mean(dtype), whole.mean(dtype))
        assert torch.equal(parts.nearest(dtype), whole.sum.to(dtype))
    assert parts.mean_sum() == whole.mean_sum()
    assert torch.equal(parts.stored(), whole.sum)
    one = Accumulator.of_parts(parts.parts[:1], 4)
    assert one.stored() is parts.parts[0] and torch.equal(one.sum, parts.parts[0].double())


def test_pooling_parts_leaves_them_as_they_are():
    parts, whole = in_parts()
    before = [part.clone() for part in parts.parts]
    assert_same(parts + parts, whole + whole)
    assert_same(parts + whole, whole + whole)
    assert all(torch.equal(a, b) for a, b in zip(before, parts.parts, strict=True))


def test_means_are_read_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr("fisherfast.accumulator._CHUNK", 7)
    entries = torch.rand(5, 11)
    parts = Accumulator.of_parts((entries,), 3)
    assert torch.equal(parts.mean(), entries.double() / 3)
    assert parts.mean_sum() == pytest.approx(float(entries.double().sum()) / 3, rel=1e-15)
    empty = Accumulator.of_parts((torch.empty(0, 3),), 3)
    assert empty.mean().shape == (0, 3) and empty.mean_sum() == 0.0
