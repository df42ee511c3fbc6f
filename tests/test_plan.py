# SPDX-License-Identifier: Apache-2.0
"""A plan: its bytes are those that the collectors hold after a run, its activations those of the graph, its work that of a count by hand."""

import gc
import importlib
import inspect
import io
import itertools
import weakref
from dataclasses import replace
from unittest.mock import ANY

import networks
import pytest
import torch
from networks import EVERY
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherfast as ff
from fisherfast.accumulator import Accumulator, RunningSum
from fisherfast.capture.calls import graph
from fisherfast.capture.passes import Passes
from fisherfast.capture.tracked import Derived
from fisherfast.fisher.run.measurement import Measurement
from fisherfast.fisher.run.run import Run

STRUCTURES = ["diagonal", "kfac", "ekfac"]
MANY = 227  # samples: no factor of the networks has seen fewer rows than a third of its columns
GIB = 2**30


@pytest.fixture
def runs(monkeypatch):
    """The runs that gave results."""
    seen, results = [], Run.results

    def remembering(self):
        seen.append(self)
        return results(self)

    monkeypatch.setattr(Run, "results", remembering)
    return seen


def tensors(thing, found):
    """Floating tensors that sums, blocks and stages are made of, by identity."""
    if isinstance(thing, RunningSum):  # as long ones are
        if thing.high is None:
            thing.fold()
        assert thing.low.shape == thing.shape  # allocated when it is asked for
    if isinstance(thing, Accumulator) and thing.parts[0].dtype == torch.float32:
        thing.parts = (thing.parts[0], thing.parts[-1] if len(thing.parts) > 1 else torch.zeros_like(thing.parts[0]))
    if isinstance(thing, torch.Tensor):
        if thing.is_floating_point():
            found[id(thing)] = thing
    elif isinstance(thing, dict):
        for value in thing.values():
            tensors(value, found)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            tensors(value, found)
    elif type(thing).__module__.startswith("fisherfast.") and type(thing).__name__ not in (
        "Capture",
        "Tracked",
        "Spread",
        "CallUse",
    ):
        tensors(
            {k: v for k, v in vars(thing).items() if k not in ("_tracked", "_uses", "_calls", "_samples", "_parameter")}, found
        )
    return found


def held(run):
    """Bytes of all that the collectors hold, but for what is of samples."""
    of_samples = ("values", "_scratch")
    every = [{k: v for k, v in vars(source).items() if k not in of_samples} for source in run.collectors]
    return sum(tensor.nbytes for tensor in tensors([{**one, "_tracked": None} for one in every], {}).values())


def measured(model, batch, structure, runs, **options):
    ff.fisher(model, [batch], structure=structure, progress=False, **options)
    return held(runs[-1])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", EVERY)
def test_bytes_are_those_of_a_run(name, structure, runs):
    build, data, *_ = EVERY[name]
    model, batch = build(), data(MANY)
    planned, found = ff.plan(model, batch, structure), measured(model, batch, structure, runs)
    unequal = (name, structure) == ("experts", "ekfac")  # a few rows alone may have chosen one of them, whose basis takes less
    assert planned.total_bytes > found if unequal else planned.total_bytes == found
    names = [n for row in planned.rows for n in row.names]
    parameters = {name.partition("[")[0] for name in names}  # a packed one has a row for each part
    assert parameters == dict(model.named_parameters()).keys() - frozen(model) and len(names) == len(set(names))


def frozen(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", [{"draws": 3}, {"fisher_type": "exact"}, {"fisher_type": "empirical"}], ids=str)
def test_bytes_of_several_passes(structure, options, runs):
    build, data = networks.COVERED["conv-groups-same"]
    for model in (build(), build().double()):
        x, y = data(MANY)
        batch = (x.to(model[0].weight.dtype), y)
        planned = ff.plan(model, batch, structure, **options)
        assert planned.total_bytes == measured(model, batch, structure, runs, **options)
        assert planned.passes == {"draws": 3, "exact": networks.C - 1}.get(options.get("fisher_type", "draws"), 1)


def test_bytes_of_a_run_with_a_checkpoint(tmp_path, runs):
    build, data = networks.COVERED["linear-sequence"]
    model, batch = build(), data(MANY)
    for structure in ("diagonal", "kfac"):
        path = tmp_path / f"{structure}.safetensors"
        actual = measured(model, batch, structure, runs, checkpoint=path)
        assert ff.plan(model, batch, structure, checkpoint=path).total_bytes == actual
        assert ff.plan(model, batch, structure, checkpoint=True).total_bytes == actual


def test_every_argument_of_a_run_is_one_of_its_plan():
    build, data = networks.COVERED["linear-sequence"]
    (model, batch), run = (build(), data(8)), inspect.signature(ff.fisher).parameters.values()
    options = {one.name: one.default for one in run if one.kind is one.KEYWORD_ONLY}
    others = {"seed": 3, "sample_offset": 100, "loss_scale": 8.0, "progress": False}
    planned = replace(ff.plan(model, batch), free_bytes=ANY)  # what is free changes meanwhile
    assert planned == ff.plan(model, batch, **options)
    assert planned == ff.plan(model, batch, **{**options, **others})
    with pytest.raises(ValueError, match="plan: loss_scale must be "):
        ff.plan(model, batch, loss_scale=0.0)


def test_bytes_of_several_requests(runs):
    build, data = networks.COVERED["layer-norm"]
    model, batch = build(), data(MANY)
    requests = (ff.Diagonal(), ff.GradientMoments(), ff.KFAC(max_factor_dim=12))
    planned = ff.plan(model, batch, requests)
    assert planned.total_bytes == measured(model, batch, requests, runs)
    assert planned.structure == "Diagonal, GradientMoments, KFAC"
    # The results are made of the sums, but for the squares, which are in two. A file has as much again.
    squares, written = 8 * sum(p.numel() for p in model.parameters()), ff.plan(model, batch, requests, checkpoint=True)
    assert planned.peak_bytes == planned.total_bytes + squares
    assert written.peak_bytes == written.total_bytes + planned.total_bytes + 2 * squares


def test_an_output_factor_above_max_factor_dim_is_a_diagonal(runs):
    model, batch = nn.Linear(3, 13), (torch.randn(7, 3), torch.randint(13, (7,)))
    asked = (ff.KFAC(max_factor_dim=5),)
    planned = ff.plan(model, batch, asked)
    assert planned.rows[0].holds == "B diagonal [13] (x) A [4, 4]"
    assert planned.total_bytes == 8 * (13 + 16) == measured(model, batch, asked, runs)


def test_a_basis_of_few_rows_takes_less(runs):
    model, batch = nn.Linear(60, 4), (torch.randn(7, 60), torch.randint(4, (7,)))
    assert measured(model, batch, "ekfac", runs) < ff.plan(model, batch, "ekfac").total_bytes


def test_bytes_with_a_basis_that_is_given(runs):
    model, batch = nn.Linear(60, 4), (torch.randn(7, 60), torch.randint(4, (7,)))
    (basis,) = ff.fisher(model, [batch], (ff.KFAC(keep_rows=True),), progress=False)
    asked = (ff.EKFAC(basis=basis),)
    found = measured(model, batch, asked, runs)  # makes of the basis what a long run leaves
    planned = ff.plan(model, batch, asked)
    assert planned.readings == 1 and planned.total_bytes == found


def test_kept_rows_are_beside_the_factors_of_their_own_run():
    model, batch = nn.Linear(60, 4), (torch.randn(7, 60), torch.randint(4, (7,)))
    rows = 4 * sum((D // 3) * D for D in (61, 4))
    planned = ff.plan(model, batch, (ff.KFAC(keep_rows=True),))
    assert planned.readings == 1 and planned.total_bytes == 8 * (61 * 61 + 4 * 4)
    assert planned.peak_bytes == planned.total_bytes + 2 * rows  # in the end joined in one tensor


@pytest.mark.parametrize(("layers", "I", "O"), [(1, 6, 7), (9, 11, 2)])
def test_the_peak_of_two_passes(layers, I, O):
    heads = nn.ModuleList(nn.Linear(I, O, bias=False) for _ in range(layers))
    heads.forward = lambda x: sum(head(x + k) for k, head in enumerate(heads))
    planned = ff.plan(heads, (torch.randn(7, I), torch.randint(O, (7,))), "ekfac")
    factors, values = layers * (I * I + O * O), layers * I * O
    few = 4 * layers * sum((D // 3) * D for D in (I, O))  # rows kept as long as they are few; in the end joined in one tensor
    eigh = 4 * 4 * max(I, O) ** 2  # of one factor in float32: the matrix, its eigenvectors, and twice that for LAPACK
    first = 8 * factors + 2 * few
    second = (8 + 4) * factors + 8 * values + eigh  # factors, eigenvectors, sums
    assert planned.peak_bytes == second > first


def test_the_result_of_a_table_is_turned_round_on_memory_of_its_own():
    V, D = 29, 7
    planned = ff.plan(nn.Sequential(nn.Embedding(V, D), nn.Flatten()), (torch.arange(3), torch.randint(D, (3,))), "ekfac")
    factors_and_eigenvectors, eigh = 8 * (V + D * D) + 4 * D * D, 4 * 4 * D * D
    assert planned.peak_bytes == factors_and_eigenvectors + 2 * 8 * V * D + eigh


def test_the_sums_of_the_first_pass_are_gone_in_the_second(monkeypatch):
    alive, over = [], Measurement.over

    def watching(self, batches, checkpoint):
        alive.append([ref() is not None for ref in watching.sums])
        results = over(self, batches, checkpoint)
        watching.sums = [weakref.ref(one) for sums in self.run.sources[0]._sums.values() for one in sums.sums]
        return results

    watching.sums = []
    monkeypatch.setattr(Measurement, "over", watching)
    build, data = networks.COVERED["layer-norm"]
    gc.disable()
    try:
        ff.fisher(build(), [data()], "ekfac", progress=False)
    finally:
        gc.enable()
    assert alive[0] == [] and alive[1] and not any(alive[1])


def test_missing_parameters_are_rows():
    model = nn.ModuleDict({"used": nn.Linear(3, 5), "idle": nn.Linear(2, 2, bias=False)})
    model.forward = lambda x: model["used"](x)
    batch = (torch.randn(7, 3), torch.randint(5, (7,)))
    with pytest.raises(ValueError, match="must reach the loss"):
        ff.plan(model, batch)
    row = ff.plan(model, batch, allow_missing=True).rows[-1]
    assert row == type(row)(("idle.weight",), "missing: the loss does not depend on it", "nothing", 0, 0.0)


# ---- rows, activations, scratch


def kept_rows(fisher):
    """Bytes of all that a GramFisher is made of."""
    tensors = {t.data_ptr(): t for pieces in fisher.pieces.values() for piece in pieces for t in piece.state()[0].values()}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize("name", EVERY)
def test_rows_are_those_of_a_run(name):
    build, data, *_ = EVERY[name]
    model, batch = build(), data(4)
    F = ff.fisher(model, [batch], "gram", progress=False)
    planned = ff.plan(model, batch, "gram")
    assert planned.total_bytes == planned.peak_bytes == kept_rows(F)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp-inplace-relu", {"fisher_type": "exact"}),
        ("conv-groups-same", {"draws": 3}),
        ("tied-embedding-and-head", {"draws": 3}),
        ("relative-bias", {"fisher_type": "empirical"}),
    ],
)
def test_rows_of_all_data_and_passes(name, options):
    build, data, *_ = EVERY[name]
    model = build()
    F = ff.fisher(model, [data(11), data(6)], "gram", progress=False, **options)
    assert ff.plan(model, data(11), "gram", num_samples=17, **options).total_bytes == kept_rows(F)


def test_rows_of_sequences_are_counted_by_hand():
    N, T, I, O = 3, 5, 2, 7
    planned = ff.plan(nn.Linear(I, O), (torch.randn(N, T, I), torch.randint(O, (N, T))), "gram", num_samples=30)
    # x and g, or the gradient where it is smaller; and for each row of G a root in float64
    assert [row.bytes for row in planned.rows] == [30 * (4 * O * I + 8), 30 * (4 * O + 8)]


def test_more_rows_than_gram_takes_are_refused():
    model, batch = nn.Linear(3, 5), (torch.randn(7, 3), torch.randint(5, (7,)))
    with pytest.raises(ValueError, match=r"at most max_rows = 20, got 24 \(2 a sample\)"):
        ff.plan(model, batch, (ff.Gram(max_rows=20),), draws=2, num_samples=12)
    with pytest.raises(ValueError, match="plan: num_samples must be >= 1, got 0"):
        ff.plan(model, batch, "gram", num_samples=0)


def saved_by_the_graph(model, batch):
    """Bytes that the nodes of a batch's graph hold in a run, each memory once, beside the model and the batch: read off the nodes."""
    found, given = {}, {t.data_ptr() for t in (*model.parameters(), *model.buffers(), *batch)}
    begin = Passes.run

    def reading(self, uses, *more, **options):
        root = uses.root
        made = [
            use.tracked.parameter for use in uses.all if isinstance(use.tracked, Derived)
        ]  # of parameters: behind them the graph is kept as well
        tensors = [root]
        for node in itertools.chain(*map(graph, [root, *made])):
            fields = [getattr(node, field) for field in dir(node) if field.startswith("_saved_")]
            tensors += [t for t in (*fields, *getattr(node, "saved_tensors", ())) if isinstance(t, torch.Tensor)]
            tensors += [t for several in fields if isinstance(several, tuple) for t in several if isinstance(t, torch.Tensor)]
        found.update(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dim()}
        )  # numbers are none
        found["gradients"] = 2 * root.nbytes
        return begin(self, uses, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passes, "run", reading)
        ff.fisher(model, [batch], progress=False)
    return sum(size for place, size in found.items() if place not in given)


BY_DATA = {"experts", "lstm-packed", "gru-packed"}  # rows that are chosen by what the data hold


@pytest.mark.parametrize(
    "name", sorted(EVERY.keys() - BY_DATA - {"checkpointed", "scale-without-axes", "spectral-norm"})
)  # cannot be read twice; numbers
def test_activations_are_what_the_graph_of_a_batch_holds(name):
    build, data, *_ = EVERY[name]
    model, batch = build(), data(13)
    assert ff.plan(model, batch).activation_bytes == saved_by_the_graph(model, batch)


def test_activations_are_counted_by_hand():
    N, I, D, C = 40, 3, 11, 4
    model = nn.Sequential(nn.Linear(I, D), nn.Tanh(), nn.Linear(D, C))
    planned = ff.plan(model, (torch.randn(N, I), torch.randint(C, (N,))))
    assert planned.activation_bytes == 4 * N * (
        D + 3 * C
    )  # of tanh its result, which the second layer's input is; logits and two gradients at them
    alone = ff.plan(model, (torch.randn(1, I), torch.randint(C, (1,))))
    assert alone.activation_bytes == 4 * (D + 2 * C)  # no samples to tell apart


def test_checkpointed_layers_keep_their_inputs_only():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(11, 11), nn.Tanh(), nn.Linear(11, 11), nn.Tanh()) for _ in range(3)))
    batch = (torch.randn(20, 11), torch.randint(11, (20,)))
    every = ff.plan(layers, batch).activation_bytes

    def checkpointed(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    layers.forward = checkpointed
    assert (every, ff.plan(layers, batch).activation_bytes) == (4 * 20 * 11 * (6 + 2), 4 * 20 * 11 * (2 + 3))


def test_scratch_is_what_a_chunk_is_turned_into(monkeypatch):
    N, T, I, O = 30, 3, 7, 5
    model, batch = nn.Linear(I, O, bias=False), (torch.randn(N, T, I), torch.randint(O, (N, T)))
    eigen_sums = importlib.import_module("fisherfast.fisher.blocks.eigen_sums")
    assert ff.plan(model, batch, "kfac").scratch_bytes == ff.plan(model, batch).scratch_bytes == 0
    Order = eigen_sums.Order
    for order, of_sample in ((Order.GRADIENTS, O * I), (Order.HALF, O * I), (Order.ROWS, T * (I + O))):
        monkeypatch.setattr(eigen_sums, "_cheapest", lambda products, order=order: order)
        monkeypatch.setattr(eigen_sums, "_CHUNK_BYTES", 2**25)
        assert ff.plan(model, batch, "ekfac").scratch_bytes == 2 * 4 * N * of_sample
        monkeypatch.setattr(eigen_sums, "_CHUNK_BYTES", 5 * 4 * of_sample)
        assert ff.plan(model, batch, "ekfac").scratch_bytes == 2 * 4 * 5 * of_sample


def test_norms_alone_take_one_tensor_for_squares_that_nobody_wants():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    asked = (ff.PerSampleNorm(),)
    sequences = ff.plan(model, (torch.randn(6, 4, 3), torch.randint(2, (6, 4))), asked)
    vectors = ff.plan(model, (torch.randn(6, 3), torch.randint(2, (6,))), asked)
    assert (sequences.scratch_bytes, vectors.scratch_bytes) == (4 * 5 * 3, 4 * 5)  # by the norms of x and g, but for the bias


# ---- work


def test_flops_of_a_deep_network_are_counted_by_hand():
    N, T, I, O, C = 6, 5, 3, 7, 4
    model = nn.Sequential(nn.Linear(I, O), nn.Tanh(), nn.Linear(O, C))
    batch = (torch.randn(N, T, I), torch.randint(C, (N, T)))
    forward = 2 * N * T * (I * O + O * C)
    diagonal = ff.plan(model, batch)
    assert diagonal.step_flops == 3 * forward
    assert {row.names: row.flops for row in diagonal.rows} == {
        ("0.weight",): 2 * N * T * I * O, ("0.bias",): 2 * N * T * O, ("2.weight",): 2 * N * T * O * C, ("2.bias",): 2 * N * T * C,
    }  # fmt: skip
    assert diagonal.run_flops == 2 * forward + diagonal.flops  # squares take the place of the weights' gradients
    kfac = ff.plan(model, batch, "kfac", draws=2)
    first = N * T * ((I + 1) ** 2 + 2 * O**2)  # half a symmetric product; A once, B in each pass
    assert [row.flops for row in kfac.rows] == [first, N * T * ((O + 1) ** 2 + 2 * C**2)]
    ekfac = ff.plan(model, batch, "ekfac", draws=2)
    tiles = T * O * (I + 1) + O * (I + 1) ** 2 + O**2 * (I + 1)
    half = T * (O**2 + O * (I + 1)) + O * (I + 1) ** 2
    rotated = T * ((I + 1) ** 2 + O**2 + O * (I + 1))
    assert ekfac.rows[0].flops == first + 2 * 2 * N * min(tiles, half, rotated)
    assert ekfac.run_flops == 2 * 3 * forward + ekfac.flops


@pytest.mark.parametrize("name", ["conv-groups-same", "relative-bias", "logaddexp"])
def test_flops_of_several_requests_add_up(name):
    build, data, *_ = EVERY[name]
    model, batch = build(), data()
    diagonal, kfac, both = (ff.plan(model, batch, asked) for asked in ("diagonal", "kfac", (ff.Diagonal(), ff.KFAC())))
    loop = diagonal.step_flops if name == "logaddexp" else 0  # once for both
    assert both.flops == pytest.approx(diagonal.flops + kfac.flops - loop, rel=1e-12)


def test_passes_over_one_position_are_added_up_first():
    build, data = networks.COVERED["mlp-inplace-relu"]
    model, batch = build(), data()
    exact, drawn = (ff.plan(model, batch, fisher_type=kind) for kind in ("exact", "mc"))
    assert exact.passes == networks.C - 1 and exact.flops == drawn.flops


def test_a_convolution_and_a_table():
    N = 6
    images = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(6 * 4, 3))
    planned = ff.plan(images, (torch.randn(N, 4, 4, 4), torch.randint(3, (N,))))
    assert planned.rows[0].flops == 2 * N * 4 * 6 * 2 * 9
    planned = ff.plan(images, (torch.randn(N, 4, 4, 4), torch.randint(3, (N,))), "kfac")
    assert planned.rows[0].flops == 2 * N * 4 * (18**2 + 3**2)
    tables = nn.Sequential(nn.Embedding(13, 5), nn.Linear(5, 3))
    planned = ff.plan(tables, (torch.randint(13, (N, 2)), torch.randint(3, (N, 2))), "kfac")
    assert planned.rows[0].flops == N * 2 * (1 + 5**2)


def test_the_fallback_goes_through_the_network_once_more():
    build, data, names = networks.FALLBACK["logaddexp"]
    planned = ff.plan(build(), data())
    (row,) = [row for row in planned.rows if row.names == ("w",)]
    assert names == {"w"} and row.way.startswith("vmap: ") and row.flops == planned.step_flops


def test_names_that_look_like_markup_are_printed_as_they_are():
    model = nn.ModuleDict({"[/a]": nn.Linear(3, 2)})
    model.forward = lambda x: model["[/a]"](x)
    console = Console(width=120, file=io.StringIO())
    console.print(ff.plan(model, (torch.randn(4, 3), None)).table())
    assert "[/a].weight" in console.file.getvalue()


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_a_plan_lets_the_model_go(structure):
    """What autograd saves are its own leaves, and each would hold the graph that holds it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    there = weakref.ref(model)
    planned = ff.plan(model, (torch.randn(64, 4), torch.arange(64) % 3), structure)
    assert planned.activation_bytes
    del model
    gc.collect()
    assert there() is None
