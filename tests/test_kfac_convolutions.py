# SPDX-License-Identifier: Apache-2.0
"""Kronecker factors of convolutions that are transposed or called several times: those of the definition, exact where theory says so."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import NaNGradient, measure
from oracle import close
from safetensors import safe_open
from test_ekfac import ORDERS, dense, go
from torch import nn

import fisherfast as ff

DOUBLE = {"dtype": torch.float64}
EXACT = 1e-11
N, C = 5, 4


def patches(images, positions, module):
    """``[n, P, C * K]`` by the definition: entry (c, k) at position p is ``images[n, c, p stride + k dilation - padding]``, or 0."""
    found = images.new_zeros(len(images), *positions, images.shape[1], *module.kernel_size)
    for p in itertools.product(*map(range, positions)):
        for k in itertools.product(*map(range, module.kernel_size)):
            at = [a * s + b * d - q for a, b, s, d, q in zip(p, k, module.stride, module.dilation, module.padding, strict=True)]
            if all(0 <= i < size for i, size in zip(at, images.shape[2:], strict=True)):
                found[(slice(None), *p, slice(None), *k)] = images[(slice(None), slice(None), *at)]
    return found.flatten(1, len(positions)).flatten(2)


def rows_of_calls(model, layer, x, y):
    """Of every call of a convolution the rows ``([n, P, inputs], [n, P, gradients])`` of its weight, by hooks and the definition."""
    calls, module = [], model.get_submodule(layer)

    def hook(_, given, out):
        out.retain_grad()
        calls.append((given[0].detach(), out))

    handle = module.register_forward_hook(hook)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    handle.remove()
    rows = []
    for images, out in calls:
        if module.transposed:
            rows.append((images.flatten(2).mT, patches(out.grad, images.shape[2:], module)))
        else:
            seen = patches(images, out.shape[2:], module)
            seen = seen if module.bias is None else torch.cat([seen, torch.ones_like(seen[..., :1])], 2)
            rows.append((seen, out.grad.flatten(2).mT))
    return rows


def factors_of(rows, groups, sharing):
    """A and B, ``[G, ., .]``, of the rows of all calls."""
    n, positions = len(rows[0][0]), sum(x.shape[1] for x, _ in rows)
    if sharing == "reduce":
        x, g, count = sum(x.sum(1) for x, _ in rows) / positions, sum(g.sum(1) for _, g in rows), n
    else:
        x, g = (torch.cat([pair[side].flatten(0, 1) for pair in rows]) for side in (0, 1))
        count = n * positions
    x, g = (t.unflatten(1, (groups, -1)).movedim(1, 0) for t in (x, g))  # a bias has a column only where there is one group
    return x.mT @ x / count, g.mT @ g / n


class Head(nn.Module):
    """A convolution, and a head that sees all of it."""

    def __init__(self, conv, size):
        super().__init__()
        self.conv = conv
        self.head = nn.Linear(conv(torch.zeros(1, conv.in_channels, *size)).numel(), C)

    def forward(self, x):
        """[N, C]."""
        return self.head(self.conv(x).tanh().flatten(1))


TRANSPOSED = {
    "1d-dilated": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, dilation=2, output_padding=1), (5,)),
    "2d-overlapping": (lambda: nn.ConvTranspose2d(3, 2, 3, bias=False), (3, 2)),
    "2d-uneven": (lambda: nn.ConvTranspose2d(2, 3, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(2, 1)), (2, 3)),
    "2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, padding=1, groups=2), (3, 3)),
    "2d-depthwise": (lambda: nn.ConvTranspose2d(3, 3, 3, stride=2, groups=3), (2, 3)),
    "3d": (lambda: nn.ConvTranspose3d(2, 2, (1, 2, 2), stride=2, output_padding=1), (2, 1, 2)),
}


def transposed(name, n=N):
    torch.manual_seed(7)
    build, size = TRANSPOSED[name]
    model = Head(build(), size).double()
    return model, torch.randn(n, model.conv.in_channels, *size).double(), torch.randint(0, C, (n,))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_factors_are_those_of_the_definition_in_any_split(name, sharing):
    model, x, y = transposed(name)
    groups = model.conv.groups
    A, B = factors_of(rows_of_calls(model, "conv", x, y), groups, sharing)
    for data in ([(x, y)], [(x[:2], y[:2]), (x[2:], y[2:])]):
        (K,) = measure(model, data, (ff.KFAC(sharing=sharing),))
        found = K.factors(**DOUBLE)["conv"]
        found = found if groups > 1 else tuple(factor.unsqueeze(0) for factor in found)
        assert close(found[0], A, EXACT) and close(found[1], B, EXACT)
    assert K.coverage["conv.weight"].startswith("conv_gram_: B [")
    assert "conv.bias" not in K.coverage or "exact [" in K.coverage["conv.bias"]


class Folded(nn.Module):
    """A transposed convolution in other words: a linear layer at every pixel, whose outputs are patches that add up."""

    def __init__(self, model, size):
        super().__init__()
        conv = model.conv
        self.linear = nn.Linear(conv.in_channels, conv.weight[0].numel(), bias=False)
        self.linear.weight.data = conv.weight.data.flatten(1).mT.clone()
        self.bias, self.head = nn.Parameter(conv.bias.data.clone().view(-1, 1, 1)), model.head
        self.geometry = {name: getattr(conv, name) for name in ("kernel_size", "dilation", "padding", "stride")}
        self.size = conv(torch.zeros(1, conv.in_channels, *size).double()).shape[2:]

    def forward(self, x):
        """[N, C]."""
        return self.head((F.fold(self.linear(x.flatten(2).mT).mT, self.size, **self.geometry) + self.bias).tanh().flatten(1))


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "reduce"])
def test_a_transposed_convolution_is_a_linear_layer_at_every_pixel_and_a_fold(structure):
    model, x, y = transposed("2d-uneven")
    asked = (ff.KFAC(sharing="reduce"),) if structure == "reduce" else structure
    one, two = (measure(m, [(x, y)], asked) for m in (model, Folded(model, x.shape[2:])))
    one, two = (r[0] if isinstance(r, tuple) else r for r in (one, two))
    assert all(close(a, b, EXACT) for a, b in zip(one.factors(**DOUBLE)["conv"], two.factors(**DOUBLE)["linear"], strict=True))
    assert one.logdet(0.1) == pytest.approx(two.logdet(0.1), rel=1e-12) and one.trace() == pytest.approx(two.trace(), rel=1e-12)
    v = {n: torch.randn(s).double() for n, s in one.shapes.items()}
    turned = {
        "linear.weight": v["conv.weight"].flatten(1).mT,
        "bias": v["conv.bias"].view(-1, 1, 1),
        **{n: v[n] for n in ("head.weight", "head.bias")},
    }
    assert close(one.solve(v, 0.1)["conv.weight"].flatten(1).mT, two.solve(turned, 0.1)["linear.weight"], 1e-9)


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("name", ["1d-dilated", "2d-uneven"])
def test_one_sample_of_one_pixel_is_exact(name, fisher_type):
    build, size = TRANSPOSED[name]
    size = (1,) * len(size)
    model, x, y = Head(build(), size).double(), torch.randn(1, build().in_channels, *size).double(), torch.randint(0, C, (1,))
    logs = model(x).log_softmax(-1)[0]
    labels = [(1.0, int(y))] if fisher_type == "empirical" else [(float(p), c) for c, p in enumerate(logs.detach().exp())]
    K = measure(model, [(x, y)], "kfac", fisher_type)
    (block,) = (block for block in K.blocks if block.place.weight == "conv.weight")
    expected = 0
    for p, c in labels:
        (s,) = torch.autograd.grad(-logs[c], [model.conv.weight], retain_graph=True)
        s = block.place.matrix({"conv.weight": s}).flatten()
        expected = expected + p * torch.outer(s, s)
    A, B = K.factors(**DOUBLE)["conv"]
    assert close(torch.kron(B, A), expected, EXACT)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_large_output_factors_are_diagonal(name):
    model, x, y = transposed(name)
    inputs = model.conv.in_channels // model.conv.groups
    largest = max(inputs, model.head.in_features + 1)  # the head's input factor is a matrix
    limited = nn.Sequential(model.conv, nn.Tanh(), nn.Flatten(), model.head.requires_grad_(False))
    K, full = (measure(limited, [(x, y)], (ff.KFAC(max_factor_dim=d),))[0] for d in (inputs, largest))
    (A, B), (all_A, all_B) = (f.factors(**DOUBLE)["0"] for f in (K, full))
    assert close(A, all_A, EXACT) and close(B, all_B.diagonal(dim1=-2, dim2=-1), EXACT)
    E = measure(limited, [(x, y)], (ff.EKFAC(max_factor_dim=inputs),))[0]
    D = measure(limited, [(x, y)], "diagonal")
    assert E.blocks[0].V is None and E.trace() == pytest.approx(D.trace(), rel=1e-12)


# -- several calls of one convolution


class Several(nn.Module):
    """One convolution of an image, of smaller ones and of one as large; ``frames``: of several images a sample, too."""

    def __init__(self, conv, sizes, frames=1):
        super().__init__()
        self.conv, self.sizes, self.frames, self.poisoned = conv, sizes, frames, None
        self.head = nn.Linear(conv.out_channels, C)

    def forward(self, x):
        """[N, C]."""
        images = [F.interpolate(x, size) for size in self.sizes]
        if self.frames > 1:
            images[0] = torch.stack([images[0] * (k + 1) for k in range(self.frames)], 1).flatten(0, 1)
        outs = [self.conv(image) for image in images]
        outs = [(NaNGradient.apply(out) if k == self.poisoned else out).tanh().flatten(2).mean(2) for k, out in enumerate(outs)]
        return self.head(sum(out.unflatten(0, (len(x), -1)).mean(1) for out in outs))


SEVERAL = {
    "two-sizes": (lambda: nn.Conv2d(3, 2, 3, padding=1), [(5, 4), (2, 3)], 1),
    "three-calls": (lambda: nn.Conv2d(3, 2, (2, 3), stride=2, bias=False), [(5, 4), (5, 4), (4, 7)], 1),
    "one-size": (lambda: nn.Conv2d(3, 2, 2), [(3, 4), (3, 4)], 1),
    "groups": (lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), [(3, 4), (2, 3)], 1),
    "frames": (lambda: nn.Conv2d(3, 2, 2), [(3, 4), (4, 2)], 2),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), [(3, 2), (1, 3)], 1),
}


def several(name, n=N):
    torch.manual_seed(7)
    build, sizes, frames = SEVERAL[name]
    model = Several(build(), sizes, frames).double()
    return model, torch.randn(n, model.conv.in_channels, 5, 4).double(), torch.randint(0, C, (n,))


def by_sample(rows, n):
    """Images of several to a sample as its positions."""
    return [tuple(t.unflatten(0, (n, -1)).flatten(1, 2) for t in pair) for pair in rows]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", SEVERAL)
def test_positions_of_all_calls_are_pooled(name, sharing):
    model, x, y = several(name)
    groups = model.conv.groups
    A, B = factors_of(by_sample(rows_of_calls(model, "conv", x, y), N), groups, sharing)
    for data in ([(x, y)], [(x[:2], y[:2]), (x[2:], y[2:])]):
        (K,) = measure(model, data, (ff.KFAC(sharing=sharing),))
        found = K.factors(**DOUBLE)["conv"]
        found = found if groups > 1 else tuple(factor.unsqueeze(0) for factor in found)
        assert close(found[0], A, EXACT) and close(found[1], B, EXACT)


@pytest.mark.parametrize("poisoned", [0, 1])
@pytest.mark.parametrize("name", ["two-sizes", "one-size", "transposed"])
def test_a_batch_of_which_one_call_is_not_finite_adds_nothing_to_a_factor(name, poisoned):
    model, x, y = several(name)
    B = measure(model, [(x, y)], "kfac").factors(**DOUBLE)["conv"][1]

    def batches():
        yield x, y
        model.poisoned = poisoned
        yield x, y

    with pytest.raises(ff.NonFiniteError, match="gradients must be finite") as error:
        measure(model, batches(), "kfac")
    assert torch.equal(error.value.fisher.factors(**DOUBLE)["conv"][1], B)


# -- both


def both():
    yield from ((transposed, name) for name in TRANSPOSED)
    yield from ((several, name) for name in SEVERAL)


BOTH = [pytest.param(make, name, id=f"{make.__name__}-{name}") for make, name in both()]


@pytest.mark.parametrize(("make", "name"), BOTH)
def test_weights_of_the_data_are_repeated_samples(make, name):
    model, x, y = make(name, 4)
    times = torch.tensor([1, 3, 0, 2])
    for structure in ("kfac", "ekfac"):
        one = measure(model, [(x, y, times.float())], structure)
        two = measure(model, [(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))], structure)
        v = torch.randn(one.num_parameters).double()
        assert close(one @ v, two @ v, 1e-9) and one.logdet(0.1) == pytest.approx(two.logdet(0.1), rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("make", "name"), BOTH)
def test_eigenvalues_are_the_second_moments_along_the_basis_in_every_order(make, name, order, monkeypatch):
    go(order, monkeypatch)
    model, x, y = make(name)
    E, D = (measure(model, [(x[:2], y[:2]), (x[2:], y[2:])], s) for s in ("ekfac", "diagonal"))
    (block,) = (block for block in E.blocks if block.place.weight == "conv.weight")
    _, G = dense(model, x, y, block)
    assert close(block.values.mean(), (block.V.mT @ G @ block.U).square().mean(0), EXACT)
    assert E.trace() == pytest.approx(D.trace(), rel=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize(("make", "name"), [(transposed, "2d-groups"), (transposed, "1d-dilated"), (several, "two-sizes")])
def test_runs_pool_and_files_are_bit_exact(make, name, structure, tmp_path):
    model, x, y = make(name)
    K = measure(model, [(x, y)], "kfac")
    asked = (ff.KFAC(),) if structure == "kfac" else (ff.EKFAC(basis=K),)
    (a,), (b,), (whole,) = (measure(model, [(x[p], y[p])], asked) for p in (slice(0, 2), slice(2, N), slice(0, N)))
    pooled, v = a + b, torch.randn(whole.num_parameters).double()
    pooled.save(tmp_path / "f")
    again = ff.load(tmp_path / "f")
    assert close(pooled @ v, whole @ v, EXACT) and torch.equal(again @ v, pooled @ v) and again.coverage == pooled.coverage
    with safe_open(tmp_path / "f", "pt") as file:
        assert {"conv.weight.A", "conv.weight.B"} < set(file.keys())
