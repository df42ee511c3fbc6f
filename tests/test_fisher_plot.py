# SPDX-License-Identifier: Apache-2.0
"""The picture of a Fisher: its curve is the sorted eigenvalues, whatever the structure, and large networks fit on it."""

import math
import sys

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.fisher.plots import chart, histogram
from fisherfast.fisher.protocol import Fisher, Spectrum

HALF_A_BIN = 10 ** (0.5 / histogram.BINS_PER_DECADE) * (1 + 1e-9)


def measured(structure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return ff.fisher(net, [(torch.randn(11, 5), torch.randint(3, (11,)))], structure=structure, progress=False)


def block(*factors, zeros=0):
    return Spectrum("", ("w",), factors, zeros)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
def test_plot_shows_traces_and_sorted_eigenvalues(structure, tmp_path):
    F = measured(structure)
    assert isinstance(F, Fisher)
    figure = F.plot(tmp_path / "fisher.png")
    assert (tmp_path / "fisher.png").read_bytes().startswith(b"\x89PNG")
    trace, spectrum = figure.axes
    layers = F.by_layer()
    assert [label.get_text() for label in trace.get_yticklabels()] == [name or "(model)" for name in layers]
    assert trace.lines[0].get_xdata() == pytest.approx([layer.trace for layer in layers.values()])
    ranks, values = (list(data) for data in spectrum.lines[0].get_data())
    eigenvalues = F.eigenvalues()
    positive = eigenvalues[: int(ranks[-1])].tolist()
    assert (eigenvalues[len(positive) :] < 1.1e-16 * eigenvalues[0]).all() and positive[-1] > 0
    assert (ranks[0], ranks[-1]) == (1, len(positive)) and ranks == sorted(ranks)
    for rank, value in zip(ranks, values, strict=True):
        assert 1 / HALF_A_BIN <= value / positive[int(rank) - 1] <= HALF_A_BIN
    assert (spectrum.get_xscale(), spectrum.get_yscale()) == ("log", "log")
    assert f"{len(positive):,} eigenvalues" in spectrum.get_title()
    for part in (structure, "mc labels", "categorical", "N = 11", "k = 66"):
        assert part in figure.get_supxlabel()


def test_histogram_counts_every_eigenvalue_in_chunks(monkeypatch):
    b, a = 10 ** (12 * torch.rand(13, dtype=torch.float64) - 9), 0.1 + torch.rand(17, dtype=torch.float64)
    blocks = [block(b, a, zeros=3), block(torch.tensor([0, 2.0, 2.0], dtype=torch.float64))]
    whole = histogram.histogram(blocks)
    monkeypatch.setattr(histogram, "_CHUNK", 5)
    assert histogram.histogram(blocks) == whole
    assert whole.negligible == 4 and sum(whole.counts) == 13 * 17 + 2
    assert list(whole.values) == sorted(whole.values, reverse=True)


def test_histogram_of_the_whole_range_of_float64():
    for value in (5e-324, 1e-300, 1.0, 1e300, 1.7e308):
        counted = histogram.histogram([block(torch.tensor([value], dtype=torch.float64))])
        assert counted.counts == (1,) and (counted.values[0] == pytest.approx(value, rel=0.03) or value < 1e-320)


def test_histogram_leaves_out_what_is_negligible_beside_the_largest():
    values = torch.tensor([3e5, 3.3e-11, 2.7e-11, 1e-300, 0], dtype=torch.float64)
    counted = histogram.histogram([block(values)])
    assert sum(counted.counts) == 2 and counted.negligible == 3


def test_histogram_takes_values_below_zero_for_rounding_and_refuses_what_is_not_finite():
    assert histogram.histogram([block(torch.tensor([-1e-20, 1.0]))]).negligible == 1
    with pytest.raises(ValueError, match=r"histogram: eigenvalues must be finite, got others in \['w'\]"):
        histogram.histogram([block(torch.tensor([1.0, math.inf]))])


def test_ranked_curve_has_both_ends_of_a_bin():
    curve = histogram.Histogram(values=(9.0, 4.0, 1.0), counts=(1, 3, 2), negligible=7).ranked()
    assert curve == ([1, 2, 4, 5, 6], [9.0, 4.0, 4.0, 1.0, 1.0])


def test_chunks_are_the_eigenvalues():
    b, a = torch.rand(4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    for size in (1, 5, 11, 1000):
        parts = list(block(b, a).chunks(size))
        assert torch.equal(torch.cat(parts), block(b, a).eigenvalues())
        assert all(len(part) <= max(size, 5) for part in parts)


def test_zero_fisher_has_a_picture():
    trace, spectrum = ff.DiagonalFisher({"a.w": torch.zeros(3)}, 7).plot().axes
    assert trace.get_xscale() == "linear" and "0 eigenvalues; 3 more are (nearly) zero" in spectrum.get_title()


def test_rows_keep_the_largest_in_order_and_sum_the_others():
    sizes = {f"l{i}": float(size) for i, size in enumerate([3, 9, 1, 7, 2])}
    rows = chart.rows(sizes, limit=2)
    assert [row.layers for row in rows] == [("l1",), ("l3",), ("l0", "l2", "l4")]
    assert rows[-1].label == "3 other layers, summed"
    assert [row.label for row in chart.rows({"": 1.0, "a": 2.0})] == ["(model)", "a"]


def test_a_thousand_layers_fit_on_a_picture():
    F = ff.DiagonalFisher({f"l{i}.w": torch.full((2,), float(i)) for i in range(1000)}, 7)
    info = ff.information_in_weights(F, {f"l{i}.w": torch.ones(2) for i in range(1000)}, prior_scale=1.0, beta=0.1)
    for figure in (F.plot(), info.plot()):
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == [*(f"l{i}" for i in range(960, 1000)), "960 other layers, summed"]
    nats = [layer.nats for layer in info.by_layer().values()]
    lengths = [bar.get_width() for bar in info.plot().axes[0].patches]
    assert lengths == [*nats[960:], 0]  # a sum has a number, but no bar that the others would vanish beside
    assert info.plot().axes[0].texts[-1].get_text() == f"{sum(nats[:960]):,.4g} (no bar)"
    others = F.plot().axes[0].lines[0].get_xdata()[-1]
    assert others == pytest.approx(2 * sum(range(960)))


def test_names_are_text_not_formulas(tmp_path):
    F = ff.DiagonalFisher({"$\\frac$.w": torch.ones(3)}, 7)
    labels = F.plot(tmp_path / "fisher.png").axes[0].get_yticklabels()
    assert [(label.get_text(), label.get_parse_math()) for label in labels] == [("$\\frac$", False)]


def test_plot_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"DiagonalFisher.plot: matplotlib is not installed; pip install 'fisherfast\[plot\]'"):
        measured("diagonal").plot()
