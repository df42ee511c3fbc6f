# SPDX-License-Identifier: Apache-2.0
"""KFAC: its factors are those of the definition, its blocks exact where theory says so, its algebra that of the dense blocks."""

import copy
import math

import curvlinops_factors
import networks
import pytest
import torch
import torch.nn.functional as F
from networks import NaNGradient, double_vectors, measure, mlp
from oracle import close
from torch import nn

import fisherfast as ff
from fisherfast.accumulator import Accumulator
from fisherfast.fisher.blocks.block_sums import mirrored
from fisherfast.fisher.blocks.exact import ExactBlock

EXACT = 1e-11


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 5, (2, 3), dilation=(1, 2), padding=(0, 2), bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(5 * 3 * 4, 4),
    ).double()  # fmt: skip


def hooked_factors(model, x, y):
    """``{layer: (sum over rows of x~ x~^T, rows, sum of g g^T)}`` of Linear and Conv2d layers, by hooks and unfold."""
    inputs, outputs = {}, {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):

            def hook(module, given, out, name=name):
                inputs[name] = given[0].detach()
                out.retain_grad()
                outputs[name] = out

            hooks.append(module.register_forward_hook(hook))
    logits = model(x)
    F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    factors = {}
    for name, module in model.named_modules():
        if name in inputs:
            rows, g = inputs[name], outputs[name].grad
            if isinstance(module, nn.Conv2d):
                rows = F.unfold(rows, module.kernel_size, module.dilation, module.padding, module.stride).mT
                g = g.flatten(2).mT
            rows, g = rows.flatten(0, -2), g.flatten(0, -2)
            if module.bias is not None:
                rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            factors[name] = (rows.mT @ rows, len(rows), g.mT @ g)
    return factors


@pytest.mark.parametrize(
    ("build", "x"), [(mlp, (6, 3)), (mlp, (6, 5, 3)), (cnn, (6, 2, 8, 7))], ids=["vectors", "sequences", "images"]
)
def test_factors_are_those_of_the_definition_in_any_split(build, x):
    model, x = build(), torch.randn(x).double()
    y = torch.randint(0, 4, model(x).shape[:-1])
    expected = hooked_factors(copy.deepcopy(model), x, y)
    for data in ([(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]):
        factors = measure(model, data, "kfac").factors(dtype=torch.float64)
        assert factors.keys() == expected.keys()
        for name, (A, rows, B) in expected.items():
            assert close(factors[name][0], A / rows, EXACT) and close(factors[name][1], B / len(x), EXACT)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_factors_are_those_of_curvlinops(name):
    (model, _), (tensors, _) = curvlinops_factors.networks()[name], curvlinops_factors.stored()
    mine = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    model.load_state_dict({key.removeprefix("weights."): t for key, t in mine.items() if key.startswith("weights.")})
    factors = measure(model, [(mine["x"], mine["y"])], "kfac").factors(dtype=torch.float64)
    assert len(factors) == 3
    for layer, (A, B) in factors.items():
        assert close(A, mine[f"{layer}.A"], EXACT) and close(B, mine[f"{layer}.B"], EXACT)


def test_collect_gives_the_same_factors_beside_a_diagonal():
    model, (x, y) = mlp(), (torch.randn(6, 5, 3).double(), torch.randint(0, 4, (6, 5)))
    with ff.collect(model, ff.Diagonal(), ff.KFAC(), fisher_type="empirical") as stats:
        for part in (slice(0, 2), slice(2, 6)):
            loss = F.cross_entropy(model(x[part]).flatten(0, 1), y[part].flatten(), reduction="none")
            stats.backward(loss.view(-1, 5).sum(1))
    diagonal, kfac = stats.results()
    expected = measure(model, [(x, y)], "kfac")
    for name, factors in expected.factors(dtype=torch.float64).items():
        assert all(close(a, b, EXACT) for a, b in zip(kfac.factors(dtype=torch.float64)[name], factors, strict=True))
    assert close(diagonal.trace(), measure(model, [(x, y)], "diagonal").trace(), EXACT)


def dense_blocks(model, losses):
    """``{weight name: the exact block of weight and bias}``, from sample gradients: ``losses`` are scalars with their weights."""
    blocks = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            total = 0
            for weight, loss in losses():
                grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
                s = torch.cat([g.reshape(g.shape[0], -1) for g in grads], 1).flatten()
                total = total + weight * torch.outer(s, s)
            blocks[name] = total
    return blocks


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_one_sample_of_one_position_is_exact(fisher_type):
    model, x, y = mlp(), torch.randn(1, 3).double(), torch.randint(0, 4, (1,))

    def losses():
        logs = model(x).log_softmax(-1)[0]
        labels = [(1.0, int(y))] if fisher_type == "empirical" else [(float(p.detach()), c) for c, p in enumerate(logs.exp())]
        yield from ((p, -logs[c]) for p, c in labels)

    factors = measure(model, [(x, y)], "kfac", fisher_type).factors(dtype=torch.float64)
    for name, expected in dense_blocks(model, losses).items():
        assert close(torch.kron(factors[name][1], factors[name][0]), expected, EXACT)


def test_deep_linear_networks_with_a_gaussian_likelihood_are_exact():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2)).double(), torch.randn(11, 3).double()

    def losses():
        out = model(x)
        yield from ((1 / 11, out[n, o]) for n in range(11) for o in range(2))

    factors = measure(model, [(x, None)], "kfac", "exact", likelihood="gaussian").factors(dtype=torch.float64)
    for name, expected in dense_blocks(model, losses).items():
        assert close(torch.kron(factors[name][1], factors[name][0]), expected, EXACT)


def matrix_of(block):
    if isinstance(block, ExactBlock):
        return block.moments.mean()
    A, B = block.factors()
    A = torch.diag_embed(A) if A.dim() == 2 else A
    return torch.block_diag(*(torch.kron(b, a) for a, b in zip(A, B, strict=True)))


@pytest.mark.parametrize("name", networks.COVERED)
def test_every_kind_of_network_has_the_algebra_of_its_dense_blocks(name):
    build, data = networks.COVERED[name]
    model, (x, y) = build().double(), data()
    x = x.double() if x.is_floating_point() else x
    K = measure(model, [(x, y)], "kfac")
    delta = 0.1 * max(K.trace() / K.num_parameters, 1e-6)
    v = {n: torch.randn(shape).double() for n, shape in K.shapes.items()}
    logdet, trace, diagonal = [], [], K.diagonal(dtype=torch.float64)
    applied, solved = K @ v, K.solve(v, delta)
    for block in K.blocks:
        dense = matrix_of(block)
        names = block.place.names

        def flat(tensors, block=block, names=names):
            return block.place.matrix({n: tensors[n] for n in names}).flatten()

        damped = dense + delta * torch.eye(len(dense), dtype=torch.float64)
        assert close(flat(applied), dense @ flat(v), EXACT)
        assert close(flat(solved), torch.linalg.solve(damped, flat(v)), 1e-8)
        assert close(flat(diagonal), dense.diagonal(), EXACT)
        logdet.append(float(torch.linalg.slogdet(damped)[1]))
        trace.append(float(dense.trace()))
    for n in set(K.names) - {n for block in K.blocks for n in block.place.names}:
        logdet.append(float((diagonal[n] + delta).log().sum()))
        trace.append(float(diagonal[n].sum()))
    assert K.logdet(delta) == pytest.approx(math.fsum(logdet), rel=1e-9)
    assert K.trace() == pytest.approx(math.fsum(trace), rel=1e-10)
    assert float(K.eigenvalues().sum()) == pytest.approx(K.trace(), rel=1e-9)
    assert sum(s.num_parameters for s in K.spectra()) == K.num_parameters == len(K.eigenvalues())
    assert sum(layer.trace for layer in K.by_layer().values()) == pytest.approx(K.trace(), rel=1e-10)
    assert K.coverage.keys() == set(K.names)


@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
def test_runs_pool_and_files_are_bit_exact(fisher_type, tmp_path):
    model, (x, y) = cnn().float(), (torch.randn(6, 2, 8, 7), torch.randint(0, 4, (6,)))
    whole = measure(model, [(x, y)], "kfac", fisher_type)
    parts = [measure(model, [(x[a:b], y[a:b])], "kfac", fisher_type, sample_offset=a) for a, b in ((0, 4), (4, 6))]
    pooled = parts[0] + parts[1]
    assert pooled.num_samples == 6
    assert close(pooled.logdet(1e-3), whole.logdet(1e-3), 1e-4) and close(pooled.trace(), whole.trace(), 1e-5)
    whole.save(tmp_path / "k.safetensors")
    again = ff.load(tmp_path / "k.safetensors")
    assert type(again) is ff.KFACFisher and again.provenance == whole.provenance and again.coverage == whole.coverage
    assert all(torch.equal(a, b) for n in whole.names for a, b in [(whole.diagonal()[n], again.diagonal()[n])])
    with pytest.raises(ValueError, match="fisher_type"):
        pooled + measure(model, [(x, y)], "kfac", "exact" if fisher_type == "empirical" else "empirical")


@pytest.mark.parametrize("name", ["mlp-inplace-relu", "embedding", "conv-groups-same", "experts", "conv1d-addmm"])
def test_weights_of_the_data_are_repeated_samples(name):
    build, data = networks.COVERED[name]
    model, (x, y) = build().double(), data(5)
    x = x.double() if x.is_floating_point() else x
    times = torch.tensor([1, 3, 0, 2, 1])
    weighted = measure(model, [(x, y, times.float())], "kfac")
    repeated = measure(model, [(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))], "kfac")
    one, two = weighted.diagonal(dtype=torch.float64), repeated.diagonal(dtype=torch.float64)
    assert all(close(one[n], two[n], EXACT) for n in one)


class Tagger(nn.Module):
    """Takes a dict batch with an attention mask, which it does not need."""

    def __init__(self):
        super().__init__()
        self.emb, self.inner, self.head = nn.Embedding(11, 5), nn.Linear(5, 7), nn.Linear(7, 4)

    def forward(self, input_ids, attention_mask=None):
        """Logits [N, T, 4]."""
        return self.head(self.inner(self.emb(input_ids)).tanh())


def test_padding_changes_nothing():
    model = Tagger().double()
    lengths = [2, 5, 3]
    ids, labels = [torch.randint(0, 11, (n,)) for n in lengths], [torch.randint(0, 4, (n,)) for n in lengths]
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)
    padded = {"input_ids": pad(ids, True, 3), "attention_mask": mask, "labels": pad(labels, True, -100)}
    alone = [{"input_ids": i[None], "labels": t[None]} for i, t in zip(ids, labels, strict=True)]
    one, two = measure(model, [padded], "kfac"), measure(model, alone, "kfac")
    for name, factors in two.factors(dtype=torch.float64).items():
        assert all(close(a, b, EXACT) for a, b in zip(one.factors(dtype=torch.float64)[name], factors, strict=True))


class Translator(nn.Module):
    """The mask is of the encoder, the labels of a decoder of the same length."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Embedding(11, 5), nn.Embedding(13, 5), nn.Linear(5, 4)

    def forward(self, input_ids, decoder_input_ids, attention_mask):
        """Logits [N, T, 4]."""
        mask = attention_mask.unsqueeze(-1)
        context = (self.encoder(input_ids) * mask).sum(1, keepdim=True)
        return self.head((self.decoder(decoder_input_ids) + context).tanh())


def test_a_mask_is_not_taken_for_that_of_other_rows_of_the_same_length():
    model = Translator().double()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids, others, y = torch.randint(0, 11, (2, 3)), torch.randint(0, 13, (2, 3)), torch.randint(0, 4, (2, 3))
    K = measure(model, [{"input_ids": ids, "decoder_input_ids": others, "attention_mask": mask, "labels": y}], "kfac")
    factors = K.factors(dtype=torch.float64)
    assert close(factors["encoder"][0], torch.bincount(ids[mask.bool()], minlength=11).double() / 5, EXACT)
    assert close(factors["decoder"][0], torch.bincount(others.flatten(), minlength=13).double() / 6, EXACT)


def test_information_in_the_weights_is_that_of_the_dense_blocks():
    model, (x, y) = mlp(), double_vectors()
    K = measure(model, [(x, y)], "kfac")
    info = ff.information_in_weights(K, model, prior_scale=0.7, beta=0.01)
    s = 0.7**2 * K.eigenvalues() / 0.01
    distance = sum(float(p.detach().square().sum()) for p in model.parameters()) / (2 * 0.7**2)
    assert info.nats == pytest.approx(distance + 0.5 * float((s.log1p() - s / (1 + s)).sum()), rel=1e-9)


def test_samples_have_the_covariance_of_the_inverse():
    model, (x, y) = nn.Linear(2, 2).double(), (torch.randn(9, 2).double(), torch.randint(0, 2, (9,)))
    K = measure(model, [(x, y)], "kfac")
    draws = K.sample(20000, damping=0.1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = torch.cat([draws[n].flatten(1) for n in K.names], 1)
    unit = torch.eye(6).double()
    inverse = torch.stack([K.solve(row, damping=0.1) for row in unit])
    assert float((flat.T.cov() - inverse).abs().max() / inverse.abs().max()) < 0.05


# -- large factors, bad input


def test_large_output_factors_are_diagonal_and_large_input_factors_refused():
    model, (x, y) = (
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 11)).double(),
        (torch.randn(6, 3).double(), torch.randint(0, 11, (6,))),
    )
    (K,) = measure(model, [(x, y)], (ff.KFAC(max_factor_dim=8),))
    full = measure(model, [(x, y)], "kfac")
    A, B = K.factors(dtype=torch.float64)["1"]
    assert close(B, full.factors(dtype=torch.float64)["1"][1].diagonal(), EXACT) and A.shape == (6, 6)
    assert "diagonal" in K.coverage["1.weight"]
    with pytest.raises(ValueError, match=r"0.weight: its input factor must be at most max_factor_dim = 3, got 4 x 4"):
        measure(model, [(x, y)], (ff.KFAC(max_factor_dim=3),))


def test_a_batch_that_is_not_finite_adds_nothing():
    model, (x, y) = mlp(), double_vectors()
    with ff.collect(model, ff.KFAC(), fisher_type="empirical") as stats:
        stats.backward(F.cross_entropy(model(x), y, reduction="none"))
        before = stats.result().diagonal(dtype=torch.float64)
        with pytest.raises(ff.NonFiniteError, match="gradients must be finite") as error:
            stats.backward(F.cross_entropy(NaNGradient.apply(model(x)), y, reduction="none"))
    after = error.value.fisher.diagonal(dtype=torch.float64)
    assert all(torch.equal(before[n], after[n]) for n in before)


class Apart(nn.Module):
    """A bias in another module than the weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2, bias=False), nn.ParameterDict({"bias": nn.Parameter(torch.randn(2))})

    def forward(self, x):
        """Logits [N, 2]."""
        return F.linear(x, self.a.weight, self.b["bias"])


def test_a_bias_of_another_module_counts_to_the_layer_of_its_weight():
    K = measure(Apart(), [(torch.randn(7, 3), None)], "kfac", "mc")
    (layer,) = K.by_layer().values()
    assert (layer.name, layer.parameters, layer.num_parameters) == ("a", ("a.weight", "b.bias"), 8)
    assert layer.trace == pytest.approx(K.trace())


def test_a_singular_system_says_so():
    K = measure(mlp(), [double_vectors(2)], "kfac")
    with pytest.warns(ff.FisherWarning, match="eigenvalues of F"):
        assert K.logdet() == -math.inf
    with pytest.raises(ValueError, match="one number for a block"):
        K.logdet({"0.weight": 0.1, "0.bias": 0.2, "2": 0.1, "4": 0.1})


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 5), (2, 256, 256), (1, 601, 601)])
def test_what_lies_below_the_diagonal_is_mirrored(shape):
    matrix = torch.randn(shape).double()
    expected = matrix.triu() + matrix.triu(1).mT
    assert torch.equal(mirrored(Accumulator(matrix.clone(), 1.0)).sum, expected)


def test_what_does_not_fit_float32_is_refused_by_all_that_reads_it():
    model, x = nn.Linear(3, 2), torch.full((4, 3), 1e20)
    K = ff.fisher(model, [(x, None)], "kfac", progress=False)
    v = torch.ones(K.num_parameters)
    for read in (K.trace, K.diagonal, K.factors, K.logdet, K.by_layer, lambda: K @ v, lambda: K.solve(v, damping=1.0)):
        with pytest.raises(ValueError, match=r"'?weight'?: its input factor must be finite"):
            read()


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
def test_dampings_and_draws_out_of_range(structure):
    F = ff.fisher(nn.Linear(3, 2), [(torch.randn(4, 3), None)], structure, progress=False)
    with pytest.raises(ValueError, match=r"damping must be 0 or at least 2\.23e-308"):
        F.logdet(1e-310)
    with pytest.raises(ValueError, match="sample: n must be >= 0, got -1"):
        F.sample(-1, damping=0.1)
