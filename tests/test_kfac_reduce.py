# SPDX-License-Identifier: Apache-2.0
"""KFAC with samples as rows: the mean of a sample's inputs, the sum of its output gradients; exact where theory says so."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Wrapped, double_vectors, measure, mlp
from oracle import close
from test_kfac import Tagger, cnn, dense_blocks
from torch import nn

import fisherfast as ff
from fisherfast.rules import Convolution, Rows

EXACT = 1e-11
REDUCE = (ff.KFAC(sharing="reduce"),)


def reduced(model, data, fisher_type="empirical", **options):
    (K,) = measure(model, data, REDUCE, fisher_type, **options)
    return K


def hooked_factors(model, x, y):
    """``{layer: (A, B)}`` of Linear and Conv2d layers by hooks, unfold and the definition."""
    inputs, outputs = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):

            def hook(module, given, out, name=name):
                out.retain_grad()
                inputs[name], outputs[name] = given[0].detach(), out

            module.register_forward_hook(hook)
    F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum").backward()
    factors = {}
    for name, rows in inputs.items():
        module, g = model.get_submodule(name), outputs[name].grad
        if isinstance(module, nn.Conv2d):
            rows = F.unfold(rows, module.kernel_size, module.dilation, module.padding, module.stride).mT
            g = g.flatten(2).mT
        rows = rows.reshape(len(x), -1, rows.shape[-1]).mean(1)
        g = g.reshape(len(x), -1, g.shape[-1]).sum(1)
        rows = rows if module.bias is None else torch.cat([rows, torch.ones(len(x), 1).double()], 1)
        factors[name] = (rows.mT @ rows / len(x), g.mT @ g / len(x))
    return factors


def several():
    """A convolution of several images a sample."""
    return Wrapped(
        lambda m, x: m.conv(x.flatten(0, 1)).tanh().view(len(x), -1, 4, 16).sum((1, 3)), conv=nn.Conv2d(2, 4, 3, bias=False)
    ).double()


@pytest.mark.parametrize(
    ("build", "x"),
    [(mlp, (6, 3)), (mlp, (6, 5, 3)), (cnn, (6, 2, 8, 7)), (several, (6, 3, 2, 6, 6))],
    ids=["vectors", "sequences", "images", "several images"],
)
def test_factors_are_those_of_the_definition_in_any_split(build, x):
    model, x = build(), torch.randn(x).double()
    y = torch.randint(0, 4, model(x).shape[:-1])
    found = [reduced(model, data).factors(dtype=torch.float64) for data in ([(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])])]
    for name, expected in hooked_factors(model, x, y).items():
        assert all(close(a, b, EXACT) for factors in found for a, b in zip(factors[name], expected, strict=True))


class Averaged(nn.Module):
    """A linear network whose outputs are averaged over positions: the setting of "reduce"."""

    def __init__(self, average=True):
        super().__init__()
        self.first, self.second, self.average = nn.Linear(3, 5), nn.Linear(5, 2), average

    def forward(self, x):
        out = self.second(self.first(x))
        return out.mean(1) if self.average else out


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_both_are_exact_in_their_own_setting(sharing):
    """A deep linear network with a Gaussian likelihood: of every position, or of the mean over positions."""
    model, x = Averaged(sharing == "reduce").double(), torch.randn(7, 5, 3).double()

    def losses():
        yield from ((1 / 7, out) for out in model(x).flatten())

    (K,) = measure(
        model, [(x, None)], (ff.KFAC(sharing=sharing),), "exact", likelihood="gaussian" if sharing == "reduce" else Each()
    )
    factors = K.factors(dtype=torch.float64)
    for name, expected in dense_blocks(model, losses).items():
        assert close(torch.kron(factors[name][1], factors[name][0]), expected, EXACT)


class Each(ff.Gaussian):
    """A Gaussian for every position of a sequence."""

    def predictions(self, output, targets, mask, sample):
        return super().predictions(output.flatten(1), targets, mask, sample)


def test_one_position_a_sample_makes_no_difference():
    model, (x, y) = mlp(), double_vectors()
    a, b = reduced(model, [(x, y)]).factors(dtype=torch.float64), measure(model, [(x, y)], "kfac").factors(dtype=torch.float64)
    assert all(close(p, q, EXACT) for name in a for p, q in zip(a[name], b[name], strict=True))


class Sequences(nn.Module):
    """A layer that sees each position, stored the other way round, behind an embedding that is frozen."""

    def __init__(self):
        super().__init__()
        self.table, self.weight, self.head = nn.Embedding(11, 3), nn.Parameter(torch.randn(3, 5)), nn.Linear(5, 4)
        self.table.requires_grad_(False)

    def forward(self, input_ids, attention_mask=None):
        return self.head((self.table(input_ids) @ self.weight).tanh())


def test_padded_packed_and_single_sequences_are_one():
    model, lengths = Sequences().double(), [2, 5, 3]
    ids, labels = ([torch.randint(0, high, (n,)) for n in lengths] for high in (11, 4))
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)
    padded = {"input_ids": pad(ids, True, 3), "attention_mask": mask, "labels": pad(labels, True, -100)}
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    packed = {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], "sample_offsets": offsets}
    alone = [{"input_ids": i[None], "labels": t[None]} for i, t in zip(ids, labels, strict=True)]
    expected = reduced(model, alone).factors(dtype=torch.float64)
    x = torch.stack([model.table(i).mean(0) for i in ids])
    assert close(expected[""][0], x.mT @ x / 3, EXACT)
    for batch in (padded, packed):
        found = reduced(model, [batch]).factors(dtype=torch.float64)
        assert all(close(a, b, EXACT) for name in expected for a, b in zip(found[name], expected[name], strict=True))


def test_weights_of_the_data_are_repeated_samples():
    model, x, y = mlp(), torch.randn(3, 5, 3).double(), torch.randint(0, 4, (3, 5))
    twice = torch.tensor([0, 1, 1, 2, 2, 2])
    a = reduced(model, [(x, y, torch.tensor([1.0, 2.0, 3.0]))]).factors(dtype=torch.float64)
    b = reduced(model, [(x[twice], y[twice])]).factors(dtype=torch.float64)
    assert all(close(p, q, 1e-7) for name in a for p, q in zip(a[name], b[name], strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), axes=st.integers(1, 3))
def test_patch_sums_are_those_of_unfolded_images(data, axes):
    K, stride, dilation, padding = (
        tuple(data.draw(st.lists(st.integers(*bounds), min_size=axes, max_size=axes)))
        for bounds in ((1, 3), (1, 3), (1, 2), (0, 3))
    )
    size = tuple((k - 1) * d + data.draw(st.integers(1, 5)) for k, d in zip(K, dilation, strict=True))
    x = torch.randn(2, 3, *size).double()
    weight = torch.eye(3 * torch.Size(K).numel()).double().view(-1, 3, *K)
    patches = (F.conv1d, F.conv2d, F.conv3d)[axes - 1](x, weight, None, stride, padding, dilation)
    form = Convolution(stride, padding, dilation)
    assert close(form.patch_sums(Rows(x, patches), K), patches.flatten(2).sum(2), EXACT)
    assert torch.equal(form.patches(Rows(x, patches), K), patches.flatten(2).mT)


def test_groups_have_factors_of_their_own():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.Flatten(), nn.Linear(6 * 9, 4)).double()
    x, y = torch.randn(5, 4, 7, 7).double(), torch.randint(0, 4, (5,))
    A, B = reduced(model, [(x, y)]).factors(dtype=torch.float64)["0"]
    for k in range(2):
        rows = F.unfold(x[:, 2 * k : 2 * k + 2], 3, stride=2).mean(2)
        rows = torch.cat([rows, torch.ones(5, 1).double()], 1)
        assert close(A[k], rows.mT @ rows / 5, EXACT)
    assert A.shape == (2, 19, 19) and B.shape == (2, 3, 3)


def test_files_and_pools_keep_the_kind_of_row(tmp_path):
    model, x, y = mlp(), torch.randn(6, 5, 3).double(), torch.randint(0, 4, (6, 5))
    A, B, whole = (reduced(model, [(x[p], y[p])]) for p in (slice(0, 2), slice(2, 6), slice(0, 6)))
    (A + B).save(tmp_path / "f")
    again = ff.load(tmp_path / "f")
    assert again.logdet(0.1) == pytest.approx(whole.logdet(0.1)) and "reduced" in again.coverage["0.weight"]
    with pytest.raises(ValueError, match="must have the same blocks"):
        A + measure(model, [(x, y)], "kfac")


def test_a_basis_may_be_of_reduced_factors():
    model, x, y = mlp(), torch.randn(6, 5, 3).double(), torch.randint(0, 4, (6, 5))
    (E,) = measure(model, [(x, y)], (ff.EKFAC(basis=reduced(model, [(x, y)])),))
    assert E.trace() <= measure(model, [(x, y)], "diagonal").trace() * (1 + 1e-9)


def test_what_has_no_mean_is_refused():
    x, y = torch.randint(0, 11, (3, 5)), torch.randint(0, 4, (3, 5))
    with pytest.raises(ValueError, match="must have inputs whose mean is a row, got an embedding"):
        reduced(Tagger().double(), [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}])
    for kind, limit, least in ((ff.KFAC, "max_factor_dim", 1), (ff.EKFAC, "max_exact_dim", 0), (ff.Gram, "max_rows", 1)):
        with pytest.raises(ValueError, match=f"{kind.__name__}: {limit} must be >= {least}, got -1"):
            kind(**{limit: -1})
        with pytest.raises(ValueError, match=f"{kind.__name__}: {limit} must be an integer, got 'many'"):
            kind(**{limit: "many"})
    with pytest.raises(ValueError, match=r"sharing must be one of \['expand', 'reduce'\], got 'sum'"):
        ff.KFAC(sharing="sum")
