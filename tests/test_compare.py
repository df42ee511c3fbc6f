# SPDX-License-Identifier: Apache-2.0
"""Two informations beside each other: differences by layer, and what must be alike for them to mean anything."""

import pytest
import torch
from test_report import shown

import fisherfast as ff

SHAPES = {"a.weight": (3, 5), "a.bias": (3,), "b.weight": (2, 3)}
HOW = {"fisher_type": "mc", "likelihood": "categorical", "draws": 1, "seed": 0}


def information(scale=1.0, *, shapes=SHAPES, structure=None, samples=7, how=None, **options):
    """Of a diagonal Fisher whose entries are all ``scale``."""
    provenance = ff.Provenance(**(HOW | (how or {})))
    F = ff.DiagonalFisher({n: torch.full(s, scale) for n, s in shapes.items()}, samples, provenance=provenance)
    if structure is not None:
        F.structure = structure
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    return ff.information_in_weights(F, weights, **({"prior_scale": 0.5, "beta": 0.1} | options))


def test_differences_are_those_of_the_layers_and_sum_to_the_whole():
    base, tuned = information(1.0), information(4.0)
    comparison = ff.compare(base, tuned, names=("base", "tuned"))
    layers = comparison.by_layer()
    assert list(layers) == ["a", "b"]
    for name, layer in layers.items():
        assert (layer.first, layer.second) == (base.by_layer()[name].nats, tuned.by_layer()[name].nats)
    assert sum(layer.difference for layer in layers.values()) == pytest.approx(comparison.difference, rel=1e-12)
    assert comparison.difference == tuned.nats - base.nats > 0
    assert comparison.notes == ()


def test_comparison_is_antisymmetric_and_zero_with_itself():
    base, tuned = information(1.0), information(4.0)
    assert ff.compare(base, tuned).difference == -ff.compare(tuned, base).difference
    assert all(layer.difference == 0 for layer in ff.compare(base, base).by_layer().values())


def test_table_and_text_show_both():
    comparison = ff.compare(information(1.0), information(4.0), names=("base", "[red]tuned"))
    table = shown(comparison.table(), 160)
    for part in ("base", "[red]tuned", "difference", "beta = 0.1", "all"):
        assert part in table
    for layer in comparison.by_layer().values():
        for number in (f"{layer.first:,.1f}", f"{layer.second:,.1f}", f"{layer.difference:+,.1f}"):
            assert number in table
    assert f"{comparison.difference:+,.1f} nats from base" in str(comparison)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"beta": 0.2}, "beta 0.1 and 0.2"),
        ({"variant": "paper"}, "variant 'exact' and 'paper'"),
        ({"how": {"fisher_type": "empirical"}}, "fisher_type 'mc' and 'empirical'"),
        ({"how": {"likelihood": "gaussian"}}, "likelihood 'categorical' and 'gaussian'"),
        ({"structure": "kfac"}, "structure 'diagonal' and 'kfac'"),
        ({"shapes": {"c.weight": (3, 5)}}, r"layers \['a', 'b'\] only in the first and \['c'\] only in the second"),
        ({"shapes": SHAPES | {"b.bias": (2,)}}, r"parameters \[\] only in the first and \['b.bias'\] only in the second"),
        ({"shapes": SHAPES | {"b.weight": (3, 2)}}, r"shapes of \['b.weight \(2, 3\) and \(3, 2\)'\]"),
    ],
)
def test_what_differs_is_refused_by_name(other, message):
    with pytest.raises(
        ValueError, match=f"compare: base and tuned must be of one architecture and measured alike, got {message}"
    ):
        ff.compare(information(), information(**other), names=("base", "tuned"))


def test_all_that_differs_is_named_at_once():
    with pytest.raises(ValueError, match=r"beta 0.1 and 0.2; variant 'exact' and 'paper'; measure both"):
        ff.compare(information(), information(beta=0.2, variant="paper"))


def test_long_lists_of_layers_are_cut():
    many = {f"l{i}.w": (1,) for i in range(99)}
    with pytest.raises(ValueError, match=r"layers \[\] only in the first and \['l0', 'l1', .*\] and \d+ more only in the second"):
        ff.compare(information(shapes={"l8.w": (1,)}), information(shapes=many))


@pytest.mark.parametrize(
    ("other", "note"),
    [
        ({"prior_scale": 0.7}, "prior scale: 0.5 (0.5 around 0) in first, 0.7 (0.7 around 0) in second"),
        (
            {"prior_scale": {"a": 0.5, "b": 0.7}},
            "prior scale: 0.5 (0.5 around 0) in first, 0.5 to 0.7 (given by layer around 0) in second",
        ),
        ({"samples": 1234}, "samples: 7 in first, 1,234 in second"),
        ({"how": {"draws": 8}}, "draws per sample: 1 in first, 8 in second"),
    ],
)
def test_what_may_differ_is_noted(other, note):
    comparison = ff.compare(information(), information(**other))
    assert comparison.notes == (note,) and note in str(comparison) and note in " ".join(shown(comparison.table(), 160).split())


@pytest.mark.parametrize("names", [("a",), ("a", "a"), "ab", ("a", "b", "c")])
def test_names_must_be_two(names):
    with pytest.raises(ValueError, match="compare: names must be two different names, got"):
        ff.compare(information(), information(), names=names)


def test_plot_shows_both_and_the_difference(tmp_path):
    comparison = ff.compare(information(1.0), information(4.0), names=("base", "$tuned$"))
    figure = comparison.plot(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    both, difference = figure.axes
    layers = comparison.by_layer().values()
    assert [list(line.get_xdata()) for line in both.lines] == [
        [layer.first for layer in layers],
        [layer.second for layer in layers],
    ]
    assert [patch.get_width() for patch in difference.patches] == [layer.difference for layer in layers]
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["base", "$tuned$"]
    assert "nats" in both.get_xlabel() and "nats" in difference.get_xlabel() and "beta = 0.1" in figure.get_supxlabel()


def test_plot_of_many_layers_sums_the_small_differences():
    shapes = {f"l{i}.w": (1,) for i in range(100)}
    difference = ff.compare(information(1.0, shapes=shapes), information(4.0, shapes=shapes)).plot().axes[1]
    widths = [patch.get_width() for patch in difference.patches]
    assert len(widths) == 41 and widths[-1] == 0
    labels = [text.get_text() for text in difference.texts]
    assert labels[0] == f"{widths[0]:+,.4g}" and labels[-1] == f"{60 * widths[0]:+,.4g} (no bar)"


def test_what_is_no_information_is_refused():
    F = ff.DiagonalFisher({"w": torch.ones(2)}, num_samples=3)
    with pytest.raises(TypeError, match="compare: both must be results of information_in_weights, got DiagonalFisher"):
        ff.compare(F, F)
