# SPDX-License-Identifier: Apache-2.0
"""``ff.fisher``: every kind of Fisher against the oracle, the invariances, and what happens when something goes wrong."""

import copy
import os
import signal
import subprocess
import sys

import networks
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherfast as ff
from fisherfast.capture import folded
from fisherfast.fisher.run import fallback

EXACT = 1e-12
FAMILIES = ["mlp-inplace-relu", "layer-norm", "embedding", "conv1d-addmm", "weight-used-twice", "positions-without-samples"]


def measure(model, batches, **options):
    return ff.fisher(model, batches, progress=False, **options)


def diagonal(fisher):
    return fisher.diagonal(dtype=torch.float64)


@pytest.mark.parametrize("name", [*FAMILIES, *networks.CHAINED, *networks.FALLBACK])
def test_exact_is_the_expectation_over_every_label(name):
    build, data = {k: v[:2] for k, v in networks.EVERY.items()}[name]
    model, (x, _) = build().double(), data(3)
    x = x.double() if x.is_floating_point() else x
    expected = oracle.diagonal(model, [(x, None)], oracle.every_label)
    assert oracle.error(diagonal(measure(model, [(x, None)], fisher_type="exact")), expected) < EXACT


@pytest.mark.parametrize("name", [*FAMILIES, "class-token-and-table", "time-first"])
@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
def test_result_does_not_depend_on_the_split_into_batches(name, fisher_type):
    model, x, y = networks.doubles(name, 6)
    options = {"fisher_type": fisher_type} | ({"draws": 2, "seed": 5} if fisher_type == "mc" else {})
    whole = measure(model, [(x, y)], **options)
    for sizes in ([1, 5], [4, 2], [1] * 6):
        split = measure(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), **options)
        assert oracle.error(diagonal(split), diagonal(whole)) < EXACT
        assert (split.num_samples, split.num_positions) == (whole.num_samples, whole.num_positions)


def test_passes_of_a_call_are_squared_once_for_all_its_parameters(monkeypatch):
    classes, squared, add = 5, [], folded.Folded.add
    monkeypatch.setattr(folded.Folded, "add", lambda self, g, scale: (squared.append(g.shape), add(self, g, scale)))
    model = nn.Sequential(nn.Linear(7, 11), nn.LayerNorm(11), nn.ReLU(), nn.Linear(11, classes)).double()
    x = torch.randn(13, 7, dtype=torch.float64)
    expected = oracle.diagonal(model, [(x, None)], oracle.every_label)
    assert oracle.error(diagonal(measure(model, [(x, None)], fisher_type="exact")), expected) < EXACT
    assert sorted(squared) == sorted([(13, 11), (13, 11), (13, classes)] * (classes - 1))
    looked_at_again = [
        (part, None) for part in x.split([4, 5, 3, 1])
    ]  # in the second and the fourth batch: one pass is not folded
    assert oracle.error(diagonal(measure(model, looked_at_again, fisher_type="exact")), expected) < EXACT


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(6)), fisher_type=st.sampled_from(["empirical", "exact"]))
def test_empirical_and_exact_do_not_depend_on_order(order, fisher_type):
    torch.manual_seed(0)
    model, x, y = networks.doubles("layer-norm", 6)
    first = measure(model, [(x, y)], fisher_type=fisher_type)
    second = measure(model, [(x[order], y[order])], fisher_type=fisher_type)
    assert oracle.error(diagonal(second), diagonal(first)) < EXACT


def test_mc_converges_to_exact():
    model, x, _ = networks.doubles("mlp-inplace-relu")
    exact, drawn = measure(model, [(x, None)], fisher_type="exact"), measure(model, [(x, None)], draws=3000)
    parts = [measure(model, [(x, None)], draws=50, seed=s).trace() for s in range(20)]
    error = torch.tensor(parts).std() / 60**0.5
    assert abs(drawn.trace() - exact.trace()) < 5 * error


def test_parts_measured_apart_pool_to_the_whole():
    model, x, y = networks.doubles("embedding")
    whole = measure(model, [(x, y)], seed=3)
    first, second = measure(model, [(x[:3], y[:3])], seed=3), measure(model, [(x[3:], y[3:])], seed=3, sample_offset=3)
    assert oracle.error(diagonal(first + second), diagonal(whole)) < EXACT


@pytest.mark.parametrize("vmap", [True, False], ids=["vmap", "loop"])
@pytest.mark.parametrize("name", networks.FALLBACK)
def test_a_loss_scale_is_taken_out_of_what_fallbacks_give(name, vmap, monkeypatch):
    model, x, y = networks.doubles(name, 5)
    if not vmap:
        monkeypatch.setattr(fallback.SampleGradients, "__call__", lambda *_: None)
    one, scaled = (measure(model, [(x, y)], fisher_type="empirical", loss_scale=s) for s in (1.0, 1024.0))
    assert oracle.error(diagonal(scaled), diagonal(one)) < EXACT


@pytest.mark.parametrize(
    ("likelihood", "loss", "targets"),
    [
        ("bernoulli", F.binary_cross_entropy_with_logits, lambda: torch.randint(0, 2, (7, 4)).double()),
        ("gaussian", lambda z, y, reduction: (z - y).square().sum() / 2, lambda: torch.randn(7, 4).double()),
        (ff.Gaussian(0.5), lambda z, y, reduction: (z - y).square().sum() * 2, lambda: torch.randn(7, 4).double()),
    ],
)
def test_other_likelihoods_match_autograd(likelihood, loss, targets):
    model, x, _ = networks.doubles("mlp-inplace-relu")
    y = targets()
    expected = oracle.diagonal(model, [(x, y)], lambda m, a, b: [(1.0, loss(m(a), b, reduction="sum"))])
    assert oracle.error(diagonal(measure(model, [(x, y)], fisher_type="empirical", likelihood=likelihood)), expected) < EXACT
    exact = measure(model, [(x, None)], fisher_type="exact", likelihood=likelihood)
    drawn = measure(model, [(x, None)], likelihood=likelihood, draws=500)
    assert drawn.trace() == pytest.approx(exact.trace(), rel=0.2)


def test_images_with_a_class_axis_in_the_middle():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 1)).double()
    x, y = torch.randn(3, 1, 5, 5).double(), torch.randint(0, 4, (3, 5, 5))
    expected = oracle.diagonal(model, [(x, y)], lambda m, a, b: [(1.0, F.cross_entropy(m(a), b, reduction="sum"))])
    result = measure(model, [(x, y)], fisher_type="empirical", likelihood=ff.Categorical(axis=1))
    assert oracle.error(diagonal(result), expected) < EXACT and result.num_positions == 75


def test_dict_batches_and_several_inputs():
    model, x, y = networks.doubles("mlp-inplace-relu")
    expected = diagonal(measure(model, [(x, y)], fisher_type="empirical"))
    by_name = networks.Wrapped(None, net=model)
    by_name.forward = lambda features, scale: {"out": model(features * scale)}
    batch = {"features": x, "scale": torch.tensor(1.0).double(), "labels": y}
    result = measure(by_name, [batch], fisher_type="empirical", output="out")
    assert oracle.error({k.removeprefix("net."): v for k, v in diagonal(result).items()}, expected) < EXACT
    pair = networks.Wrapped(None, net=model)
    pair.forward = lambda a, b: model(a + b)
    result = measure(pair, [((x / 2, x / 2), y)], fisher_type="empirical", output=lambda logits: logits)
    assert oracle.error({k.removeprefix("net."): v for k, v in diagonal(result).items()}, expected) < EXACT


def test_unused_parameters_are_named_or_recorded():
    model, x, y = networks.doubles("mlp-inplace-relu")
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"1 of 5 that do not, \['idle'\]"):
        measure(model, [(x, y)])
    result = measure(model, [(x, y)], allow_missing=True)
    assert "idle" not in result.names and result.coverage["idle"].startswith("missing")


def test_sees_through_wrappers_and_refuses_compiled_models():
    model, x, y = networks.doubles("mlp-inplace-relu")
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    result = measure(model, [(x, y)], fisher_type="empirical")
    try:
        through = measure(compiled, [(x, y)], fisher_type="empirical")
    except ValueError as error:
        assert "already compiled model" in str(error)
    else:
        assert through.names == result.names and oracle.error(diagonal(through), diagonal(result)) < EXACT


def test_parameters_that_were_computed_are_said_to_be():
    model = copy.deepcopy(torch.jit.script(nn.Sequential(nn.Linear(3, 4))))
    with pytest.raises(ValueError, match=r"must be leaves of autograd's graph, got 2 of 2 that were computed .*script the copy"):
        measure(model, [(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))])


# -- what goes wrong


class Faulty(nn.Module):
    """Passes its input on, until batch ``at``: then does ``fault`` to it."""

    def __init__(self, fault, at=2):
        super().__init__()
        self.fault, self.at, self.batches = fault, at, 0

    def forward(self, x):
        """Count real batches (7 samples; the probe's are smaller) and strike."""
        self.batches += len(x) == networks.N
        return self.fault(x) if self.batches > self.at else x


def faulty(fault):
    return nn.Sequential(nn.Linear(3, 11), nn.Tanh(), Faulty(fault), nn.Linear(11, 4)).double()


def batches(count=4):
    return [(x.double(), y) for x, y in (networks.vectors() for _ in range(count))]


def raising(error):
    def fault(x):
        raise error

    return fault


def kept_exactly(error, model, data, names):
    """What the error carries is exactly the first two batches', for the parameters ``names``."""
    model[2].at = 10**9
    expected = diagonal(measure(copy.deepcopy(model), data[:2], fisher_type="empirical"))
    assert error.fisher.num_samples == 2 * networks.N
    result = diagonal(error.fisher)
    assert oracle.error({n: result[n] for n in names}, {n: expected[n] for n in names}) < EXACT


FAULTS = {
    "nan-activations": (lambda x: x * float("nan"), ff.NonFiniteError, r"batch 2: .*'3.weight' is the first that is not finite"),
    "infinite-activations": (lambda x: x + float("inf"), ff.NonFiniteError, r"batch 2: .*'3.weight'"),
    "model-raises": (raising(KeyError("lost")), KeyError, "lost"),
    "out-of-memory": (raising(torch.OutOfMemoryError("CUDA out of memory")), torch.OutOfMemoryError, "out of memory"),
    "host-out-of-memory": (lambda x: x.new_empty(2**50), RuntimeError, "alloc|memory"),
    "ctrl-c": (raising(KeyboardInterrupt()), ff.Interrupted, None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_batch_loses_nothing_before_it(name):
    fault, kind, message = FAULTS[name]
    model, data = faulty(fault), batches()
    with pytest.raises(kind, match=message) as caught:
        measure(model, data, fisher_type="empirical")
    kept_exactly(caught.value, model, data, ["0.weight", "0.bias", "3.weight", "3.bias"])


def test_nan_born_in_the_backward_pass_names_its_layer_and_enters_no_sum():
    model, data = faulty(networks.NaNGradient.apply), batches()
    with pytest.raises(ff.NonFiniteError, match=r"batch 2: gradients must be finite, .* first at '0.weight'") as caught:
        measure(model, data, fisher_type="empirical")
    kept_exactly(caught.value, model, data, ["0.weight", "0.bias"])
    # The layers behind had finite gradients of this batch: they keep them, with the weight that goes with them.
    model[2].at = 10**9
    expected = diagonal(measure(copy.deepcopy(model), data[:3], fisher_type="empirical"))
    result = diagonal(caught.value.fisher)
    names = ["3.weight", "3.bias"]
    assert oracle.error({n: result[n] for n in names}, {n: expected[n] for n in names}) < EXACT


@pytest.mark.parametrize("fisher_type", ["exact", "mc"])
def test_several_passes_count_only_when_complete(fisher_type):
    class Late(torch.autograd.Function):
        seen = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            Late.seen += 1
            return g * (float("nan") if Late.seen > 1 else 1.0)

    model, data = faulty(Late.apply), batches()
    with pytest.raises(ff.NonFiniteError, match="gradients must be finite") as caught:
        measure(model, data, fisher_type=fisher_type, **({"draws": 3} if fisher_type == "mc" else {}))
    model[2].at = 10**9
    expected = measure(copy.deepcopy(model), data[:2], fisher_type=fisher_type, **({"draws": 3} if fisher_type == "mc" else {}))
    assert oracle.error(diagonal(caught.value.fisher), diagonal(expected)) < EXACT


def test_interrupt_is_still_a_keyboard_interrupt():
    assert issubclass(ff.Interrupted, KeyboardInterrupt) and not issubclass(ff.Interrupted, Exception)


@pytest.mark.parametrize("fault", ["dropout", "batch-norm", "functional-dropout"])
def test_train_mode_is_refused_before_it_does_harm(fault):
    layer = {
        "dropout": nn.Dropout(0.5),
        "batch-norm": nn.BatchNorm1d(11),
        "functional-dropout": networks.Wrapped(lambda m, x: F.dropout(x, 0.5, training=True)),
    }[fault]
    model = nn.Sequential(nn.Linear(3, 11), layer, nn.Linear(11, 4))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        measure(model, [networks.vectors()])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.train()
    if fault == "batch-norm":
        with pytest.raises(ValueError, match="'1'"):
            ff.collect(model, ff.Diagonal())


def test_train_mode_without_chance_is_fine():
    model, x, y = networks.doubles("layer-norm")
    model.train()
    assert measure(model, [(x, y)]).num_samples == networks.N


@pytest.mark.parametrize("operator", [False, True], ids=["fisher", "operator"])
@pytest.mark.parametrize("N", [3, 9])
def test_a_model_that_changes_itself_is_not_blamed_for_dependent_samples(operator, N):
    """In train mode spectral_norm improves its singular vectors in every forward pass."""
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 5)), nn.Linear(5, 4))
    data = [(torch.randn(N, 3), torch.randint(0, 4, (N,)))]
    with pytest.raises(ValueError, match=r"model: must have the same output for the same batch, got two .*call model\.eval"):
        _ = ff.FisherOperator(model, data) @ torch.ones(44) if operator else measure(model, data)


def test_samples_that_depend_on_each_other_are_refused():
    model = nn.Sequential(nn.Linear(3, 11), networks.Wrapped(lambda m, x: x - x.mean(0)), nn.Linear(11, 4)).double()
    with pytest.raises(ValueError, match="samples must not depend on each other"):
        measure(model, batches(1))


@pytest.mark.parametrize("sizes", [[5], [1, 3], [1, 1, 3]], ids=str)
def test_samples_that_depend_on_each_other_are_refused_in_the_first_batch_of_several(sizes):
    """A batch of one sample says nothing of it."""
    model = nn.Sequential(nn.Linear(3, 11), networks.Wrapped(lambda m, x: x - x.mean(0)), nn.Linear(11, 4)).double()
    with ff.collect(model, ff.Diagonal()) as stats:
        for N in sizes:
            losses = F.cross_entropy(model(torch.randn(N, 3).double()), torch.randint(4, (N,)), reduction="none")
            if N == 1:
                stats.backward(losses)
            else:
                with pytest.raises(ValueError, match="a row must belong to one sample"):
                    stats.backward(losses)


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        ([], {}, ValueError, "data must yield at least one batch"),
        ([(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))], {}, ValueError, "at least one sample"),
        ([torch.zeros(2, 3)], {}, TypeError, "a batch must be"),
        ([(torch.zeros(2, 3), torch.tensor([0, 9]))], {}, ValueError, r"labels must lie in \[0, C = 4\)"),
        ([(torch.zeros(2, 3), torch.tensor([0, 1, 2]))], {}, ValueError, "inputs and targets must hold the same samples"),
        ([(torch.zeros(2, 3), None)], {"fisher_type": "empirical"}, ValueError, "needs the labels"),
        ([(torch.zeros(2, 3), None)], {"output": lambda z: z.sum()}, ValueError, "sample axis first"),
        ([(torch.zeros(2, 3), None)], {"output": lambda z: z[:, 0]}, ValueError, "add the class axis"),
        ([(torch.zeros(2, 3), None)], {"output": lambda z: "no"}, TypeError, "must be a tensor"),
        ([(torch.zeros(2, 3), None)], {"fisher_type": "exact", "max_passes": 2}, ValueError, "use fisher_type='mc'"),
        ([(torch.zeros(2, 3), None)], {"fisher_type": "true"}, ValueError, "fisher_type must be one of"),
        ([(torch.zeros(2, 3), None)], {"structure": "full"}, ValueError, "structure must be one of"),
        ([(torch.zeros(2, 3), None)], {"draws": 0}, ValueError, "draws must be"),
        ([(torch.zeros(2, 3), None)], {"draws": 2, "fisher_type": "exact"}, ValueError, "draws must be"),
        ([(torch.zeros(2, 3), None)], {"seed": 10**22}, ValueError, r"seed must be at least -2\*\*63 and below 2\*\*63, got"),
        ([(torch.zeros(2, 3), ["cat", "dog"])], {}, TypeError, "targets must be numbers, got list of str .*number the classes"),
        ([(torch.zeros(2, 3), [[0], [0, 1]])], {}, TypeError, "targets must be numbers, got list of list .*pad what differs"),
    ],
)
def test_rejects(data, options, kind, message):
    with pytest.raises(kind, match=message):
        measure(nn.Linear(3, 4), data, **options)


def test_rejects_in_collect():
    model, (x, y) = nn.Linear(3, 4), networks.vectors()
    with ff.collect(model, ff.Diagonal()) as stats:
        with pytest.raises(ValueError, match="must be a vector"):
            stats.backward(F.cross_entropy(model(x), y))
        with pytest.raises(ValueError, match="one without a graph"):
            stats.backward(torch.ones(3))
        with pytest.raises(ff.NonFiniteError, match="'weight' is the first that is not finite"):
            stats.backward(F.cross_entropy(model(x / 0), y, reduction="none"))
        with pytest.raises(RuntimeError, match=r"call stats.backward\(loss\)"):
            F.cross_entropy(model(x), y).backward()
        with pytest.raises(ValueError, match="at least one"):
            stats.results()
        stats.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert stats.result().num_samples == 7
    with pytest.raises(ValueError, match="nothing"):
        ff.collect(model)


# -- checkpoints


def test_checkpoint_resumes_to_the_same_numbers(tmp_path):
    path, data = tmp_path / "run.safetensors", batches(5)
    model = faulty(raising(RuntimeError("power cut")))
    whole_model = copy.deepcopy(model)
    whole_model[2].at = 10**9
    with pytest.raises(RuntimeError, match="power cut"):
        measure(model, data, draws=2, checkpoint=path)
    assert ff.load(path).batches == 2
    model[2].at = 10**9
    resumed = measure(model, data, draws=2, checkpoint=path)
    whole = measure(whole_model, data, draws=2)
    assert resumed.num_samples == 35 and oracle.error(diagonal(resumed), diagonal(whole)) < EXACT
    with pytest.raises(ValueError, match="must be of the same measurement"):
        measure(model, data, draws=3, checkpoint=path)


def test_a_checkpoint_of_another_model_or_of_more_data_is_refused(tmp_path):
    path, data = tmp_path / "run.safetensors", batches(4)
    model = nn.Linear(networks.I, networks.C).double()
    whole = measure(model, data, checkpoint=path)
    assert measure(model, data, checkpoint=path).trace() == whole.trace()
    with pytest.raises(ValueError, match=r"data must yield the 4 batches that .* holds, got 3; give the same data"):
        measure(model, data[:3], checkpoint=path)
    with pytest.raises(ValueError, match="data must yield the 4 batches"):
        measure(model, [], checkpoint=path)
    with torch.no_grad():
        model.bias += 1
    with pytest.raises(ValueError, match="must be of the same measurement"):
        measure(model, data, checkpoint=path)


KILLED = """
import importlib, os, signal, sys, torch
import fisherfast as ff
importlib.import_module("fisherfast.fisher.measure")._CHECKPOINT_SECONDS = 0.0
torch.manual_seed(0)
model = torch.nn.Linear(3, 4)
data = [(torch.randn(7, 3), None) for _ in range(5)]
def batches(stop):
    for number, batch in enumerate(data):
        if number == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
result = ff.fisher(model, batches(int(sys.argv[2])), checkpoint=sys.argv[1], progress=False)
print(result.num_samples, result.trace().hex())
"""


def test_killed_process_resumes_to_the_same_numbers(tmp_path):
    def run(path, stop):
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        return subprocess.run([sys.executable, "-c", KILLED, path, str(stop)], capture_output=True, text=True, env=environment)

    killed = run(tmp_path / "a", 3)
    assert killed.returncode == -signal.SIGKILL
    resumed, whole = run(tmp_path / "a", 99), run(tmp_path / "b", 99)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout and resumed.stdout.startswith("35 ")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        for n in range(6):
            yield torch.full((3,), float(n)), n % 2


@pytest.mark.parametrize("structure", ["diagonal", "ekfac"])
def test_a_loader_without_a_length(structure):
    data = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert ff.fisher(torch.nn.Linear(3, 2), data, structure, "empirical").num_samples == 6


@pytest.mark.parametrize("name", ["seed", "draws", "sample_offset", "max_passes"])
def test_counts_are_integers_of_any_kind(name, tmp_path):
    model, data = torch.nn.Linear(3, 2), [(torch.randn(4, 3), None)]
    results = []
    for number in (2, np.int64(2), torch.tensor(2)):
        results.append(ff.fisher(model, data, progress=False, **{name: number}))
        results[-1].save(tmp_path / "f.safetensors")
    assert len({F.trace() for F in results}) == 1
    for wrong in (1.5, "2", None):
        with pytest.raises(ValueError, match=f"fisher: {name} must be an integer, got"):
            ff.fisher(model, data, progress=False, **{name: wrong})


def test_a_checkpoint_needs_its_folder(tmp_path):
    with pytest.raises(ValueError, match="checkpoint must be a file in a folder that exists"):
        ff.fisher(torch.nn.Linear(3, 2), [(torch.randn(4, 3), None)], checkpoint=tmp_path / "no" / "f", progress=False)


def test_a_second_pass_compares_what_is_empty():
    class Takes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x, nothing):
            return self.layer(x)

    data = [((torch.randn(4, 3), torch.empty(4, 0)), None)]
    assert ff.fisher(Takes(), data, "ekfac", progress=False).num_samples == 4
