# SPDX-License-Identifier: Apache-2.0
"""Weights that multiply the same inputs (queries, keys, values) have one input factor: added, stored and decomposed once."""

import importlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from networks import Wrapped, breaking_off, measure
from oracle import close
from safetensors import safe_open
from torch import nn

import fisherfast as ff

block_sums = importlib.import_module("fisherfast.fisher.blocks.block_sums")
N, T = 6, 5
EXACT = 1e-11


class Attention(nn.Module):
    """Queries, keys and values of one tensor; ``apart``: of copies of it, which nobody can know to be the same."""

    def __init__(self, apart=False, other=False):
        super().__init__()
        self.q, self.k, self.v, self.gate = nn.Linear(3, 7), nn.Linear(3, 7), nn.Linear(3, 7), nn.Linear(3, 7, bias=False)
        self.back, self.head = nn.Parameter(torch.randn(3, 7)), nn.Linear(7, 4)
        self.apart, self.other = apart, other

    def forward(self, x):
        """[N, T, 3] to [N, T, 4]."""
        copy = x.clone if self.apart else lambda: x
        q, k = self.q(copy()), self.k(copy())
        v = self.v(2 * x if self.other else copy())
        out = (q @ k.mT).softmax(-1) @ v
        return self.head((out * self.gate(copy()).sigmoid() + copy() @ self.back).tanh())


def models():
    one, two = Attention().double(), Attention(apart=True).double()
    two.load_state_dict(one.state_dict())
    return one, two


def data(n=N):
    return torch.randn(n, T, 3).double(), torch.randint(0, 4, (n, T))


STRUCTURES = {"kfac": "kfac", "ekfac": "ekfac", "reduce": (ff.KFAC(sharing="reduce"),)}


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_blocks_are_those_of_inputs_that_are_not_known_to_be_the_same(structure, fisher_type):
    x, y = data()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    results = [measure(model, batches, STRUCTURES[structure], fisher_type) for model in models()]
    shared, apart = (result[0] if isinstance(result, tuple) else result for result in results)
    leaders = {block.place.weight: block.place.input_of for block in shared.blocks}
    assert leaders == {"back": None, "q.weight": None, "k.weight": "q.weight", "v.weight": "q.weight", "gate.weight": "back", "head.weight": None}  # fmt: skip
    assert not any(block.place.input_of for block in apart.blocks)
    v = torch.randn(shared.num_parameters).double()
    assert close(shared @ v, apart @ v, EXACT) and close(shared.solve(v, 0.1), apart.solve(v, 0.1), 1e-9)
    assert shared.logdet(0.1) == pytest.approx(apart.logdet(0.1), rel=1e-9) and shared.trace() == pytest.approx(apart.trace())
    assert "of q.weight" in shared.coverage["k.weight"]


def test_they_are_added_stored_and_decomposed_once(monkeypatch):
    calls, decomposed = Counter(), Counter()
    gram, values = block_sums.gram_, torch.linalg.eigvalsh

    def counting(acc, x, *arguments, **options):
        calls[x.shape[-1]] += 1
        return gram(acc, x, *arguments, **options)

    monkeypatch.setattr(block_sums, "gram_", counting)
    K = measure(models()[0], [data()], "kfac")
    assert calls == {3: 2, 7: 6, 4: 1}  # x with a one, x without; g of q, k, v, gate and back, the head's x; the head's g
    blocks = {block.place.weight: block for block in K.blocks}
    assert blocks["q.weight"].A is blocks["k.weight"].A is blocks["v.weight"].A is not blocks["gate.weight"].A
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda F: decomposed.update([F.shape[-1]]) or values(F))
    K.logdet(0.1)
    # A of q, k, v and B of the head; A of gate and back; B; A of the head; and again the three that are singular, at unit diagonals.
    assert decomposed == {4: 2 + 1, 3: 1, 7: 5 + 2, 8: 1}


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_pools_and_files_have_them_once(structure, tmp_path):
    model, (x, y) = models()[0], data()
    basis = measure(model, [(x, y)], "kfac")
    asked = ff.KFAC() if structure == "kfac" else ff.EKFAC(basis=basis)
    (A,), (B,), (whole,) = (measure(model, [(x[p], y[p])], (asked,)) for p in (slice(0, 2), slice(2, N), slice(0, N)))
    pooled = A + B
    pooled.save(tmp_path / "f")
    with safe_open(tmp_path / "f", "pt") as file:
        assert {name for name in file.keys() if name.endswith((".A", ".U"))} <= {
            f"{weight}.{part}" for weight in ("q.weight", "back", "head.weight") for part in "AU"
        }
    again = ff.load(tmp_path / "f")
    v = torch.randn(whole.num_parameters).double()
    assert torch.equal(again @ v, pooled @ v) and close(pooled @ v, whole @ v, EXACT)
    accumulators = [one for block in again.blocks for one in block.accumulators()]
    assert len({id(one) for one in accumulators}) == len({one.sum.data_ptr() for one in accumulators}) == len(accumulators)
    if structure == "kfac":
        blocks = {block.place.weight: block for block in again.blocks}
        assert blocks["q.weight"].A is blocks["v.weight"].A


def test_damping_in_the_factors_takes_them_apart():
    one, two = models()
    batch = data()
    a, b = measure(one, [batch], "kfac").factored(0.1), measure(two, [batch], "kfac").factored(0.1)
    assert a.logdet() == pytest.approx(b.logdet()) and not any(block.place.input_of for block in a.blocks)


def test_a_checkpoint_is_gone_on_from(tmp_path):
    model, (x, y) = models()[0], data()
    with pytest.raises(OSError, match="the data are gone"):
        measure(model, breaking_off(x, y), "kfac", checkpoint=tmp_path / "c")
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    v = torch.randn(sum(p.numel() for p in model.parameters())).double()
    assert close(measure(model, batches, "kfac", checkpoint=tmp_path / "c") @ v, measure(model, batches, "kfac") @ v, EXACT)


def test_inputs_that_differ_in_a_later_batch_are_refused():
    model, (x, y) = models()[0], data()

    def changing():
        yield x, y
        model.other = True
        yield x, y

    with pytest.raises(ValueError, match=r"must have the inputs of 'q\.weight' as in the first batch, got others"):
        measure(model, changing(), "kfac")


def test_copies_in_a_later_batch_are_the_same_inputs():
    (model, reference), (x, y) = models(), data()

    def changing():
        yield x[:2], y[:2]
        model.apart = True
        yield x[2:], y[2:]

    K, expected = measure(model, changing(), "kfac"), measure(reference, [(x, y)], "kfac")
    v = torch.randn(K.num_parameters).double()
    assert close(K @ v, expected @ v, EXACT)


def test_collect_shares_them_too():
    (model, reference), (x, y) = models(), data()
    with ff.collect(model, ff.KFAC(), fisher_type="empirical") as stats:
        for part in (slice(0, 2), slice(2, N)):
            stats.backward(F.cross_entropy(model(x[part]).flatten(0, 1), y[part].flatten(), reduction="none").view(-1, T).sum(1))
    K, v = stats.result(), torch.randn(sum(p.numel() for p in model.parameters())).double()
    assert sum(block.place.input_of is not None for block in K.blocks) == 3
    assert close(K @ v, measure(reference, [(x, y)], "kfac") @ v, EXACT)


class Branches(nn.Module):
    """Two weights of one input, one of which may be left out of a batch."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 4)
        self.apart, self.left_out = False, None

    def forward(self, x):
        """[N, T, 3] to [N, T, 4]."""
        ways = [("q", self.q), ("k", self.k), ("v", self.v)]
        return self.head(sum(w(x.clone() if self.apart else x).tanh() for name, w in ways if name != self.left_out))


class Batches:
    """Three batches, a weight left out of the second."""

    def __init__(self, model, left_out, x, y):
        self.model, self.left_out, self.x, self.y = model, left_out, x, y

    def __iter__(self):
        for k, left_out in enumerate((None, self.left_out, None)):
            self.model.left_out = left_out
            yield (k + 1) * self.x[2 * k : 2 * k + 2], self.y[2 * k : 2 * k + 2]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("left_out", ["q", "k"])
def test_a_weight_that_is_left_out_of_a_batch_has_inputs_of_its_own_from_then_on(structure, left_out):
    model, (x, y) = Branches().double(), data()
    results = []
    for model.apart in (False, True):
        result = measure(model, Batches(model, left_out, x, y), STRUCTURES[structure])
        results.append(result[0] if isinstance(result, tuple) else result)
    shared, apart = results
    v = torch.randn(shared.num_parameters).double()
    assert close(shared @ v, apart @ v, EXACT) and close(shared.solve(v, 0.1), apart.solve(v, 0.1), 1e-9)


def test_it_has_them_after_a_checkpoint_too(tmp_path):
    model, (x, y) = Branches().double(), data()

    class Broken(Batches):
        def __iter__(self):
            for k, batch in enumerate(super().__iter__()):
                if k == 2:
                    raise OSError("the data are gone")
                yield batch

    with pytest.raises(OSError, match="the data are gone"):
        measure(model, Broken(model, "k", x, y), "kfac", checkpoint=tmp_path / "c")
    resumed = measure(model, Batches(model, "k", x, y), "kfac", checkpoint=tmp_path / "c")
    whole = measure(model, Batches(model, "k", x, y), "kfac")
    v = torch.randn(whole.num_parameters).double()
    assert close(resumed @ v, whole @ v, EXACT)


@pytest.mark.parametrize("first", [0, 1])
def test_data_sets_of_which_one_shares_inputs_pool(first):
    """Where a batch left a layer out, its factor A became its own."""
    model = Wrapped(lambda m, x: m.a(x) + m.b(x) if x[0, 0] > 0 else m.a(x), a=nn.Linear(5, 3), b=nn.Linear(5, 3)).double()
    x = torch.randn(3, 4, 5).double()
    x[:, 0, 0] = torch.tensor([1.0, -1.0, 1.0])
    data = [(one, torch.randint(0, 3, (4,))) for one in x]
    parts = [data[:1], data[1:][::-1]]
    parts = parts[::-1] if first else parts
    one, other = (ff.fisher(model, part, "kfac", "empirical", progress=False) for part in parts)
    whole = ff.fisher(model, parts[0] + parts[1], "kfac", "empirical", progress=False)
    assert (one + other).trace() == pytest.approx(whole.trace(), rel=1e-12)
    assert (one + other).logdet(0.1) == pytest.approx(whole.logdet(0.1), rel=1e-9)


def test_a_batch_that_fails_half_way_lends_its_inputs_to_no_other():
    model, (x, y) = Branches().double(), data()
    model.head.requires_grad_(False)  # the op of queries, keys or values fails, when the others' inputs have not come
    with ff.collect(model, ff.KFAC(), fisher_type="empirical") as stats:
        for k, fails in enumerate((False, True, False)):
            part = slice(2 * k, 2 * k + 2)
            losses = F.cross_entropy(model(x[part]).flatten(0, 1), y[part].flatten(), reduction="none").view(-1, T).sum(1)
            if fails:
                with pytest.raises(ff.BackendError, match="'cuda' was asked for but cannot run here"), ff.backend("cuda"):
                    stats.backward(losses)
            else:
                stats.backward(losses)
    K, expected = stats.result(), measure(model, [(x[:2], y[:2]), (x[4:], y[4:])], "kfac")
    v = torch.randn(K.num_parameters).double()
    assert sum(block.place.input_of is not None for block in K.blocks) == 2 and close(K @ v, expected @ v, EXACT)
