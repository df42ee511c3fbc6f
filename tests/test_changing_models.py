# SPDX-License-Identifier: Apache-2.0
"""Nothing is left out in silence: what a batch uses otherwise than those before it is followed, or refused by name."""

import threading
import warnings

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfast as ff

EXACT = 1e-9


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batches(count=3, N=8):
    return [(torch.randn(N, 6).double(), torch.randint(0, 4, (N,))) for _ in range(count)]


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("asked", [ff.Diagonal(), ff.Gram()], ids=["diagonal", "gram"])
def test_a_later_batch_that_ran_outside_the_block_is_looped_over(asked):
    model, data = network(), batches()
    stats = ff.collect(model, asked, fisher_type="empirical")
    with stats:
        stats.backward(losses(model, *data[0]))
    with pytest.warns(ff.FisherWarning, match="the model should run in the block"):
        stats.backward(losses(model, *data[1]))
    with stats:
        stats.backward(losses(model, *data[2]))
    F_ = stats.result()
    assert F_.num_samples == 24
    assert oracle.error(F_.diagonal(dtype=torch.float64), oracle.diagonal(model, data, oracle.cross_entropy)) < EXACT


def test_a_model_that_maps_over_its_samples_ran_in_the_block():
    """torch.func hides the uses of all parameters."""
    layer, (x, y) = nn.Linear(6, 4).double(), batches()[0]
    model = networks.Wrapped(lambda m, x: torch.vmap(m.layer)(x), layer=layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ff.collect(model, ff.Diagonal()) as stats:
            stats.backward(losses(model, x, y))
    expected = oracle.diagonal(model, [(x, y)], oracle.cross_entropy)
    assert oracle.error(stats.result().diagonal(dtype=torch.float64), expected) < EXACT


class Scaled(torch.autograd.Function):
    """A use that no torch function shows."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        return g * scale, (g * x).sum(0)


class Late(nn.Module):
    """Scales its inputs by a function of its own from the second batch on."""

    def __init__(self):
        super().__init__()
        self.scale, self.head, self.hidden = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 4), False

    def forward(self, x):
        return self.head(Scaled.apply(x, self.scale) if self.hidden else x * self.scale)


@pytest.mark.parametrize("how", ["collect", "fisher"])
def test_a_hidden_use_in_a_later_batch_counts(how):
    model, data = Late().double(), batches()
    if how == "collect":
        with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
            for n, batch in enumerate(data):
                model.hidden = n == 1
                stats.backward(losses(model, *batch))
        found = stats.result()
    else:

        def stream():
            for n, batch in enumerate(data):
                model.hidden = n == 1
                yield batch

        found = ff.fisher(model, stream(), "diagonal", "empirical", progress=False)
    model.hidden = False
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, data, oracle.cross_entropy)) < EXACT


def replaced(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def assigned(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def grown(model):
    model.append(nn.Linear(4, 4).double())


def unfrozen(model):
    model[0].bias.requires_grad_(True)


CHANGES = {
    "replaced": (replaced, "0.weight"),
    "assigned": (assigned, "0.weight"),
    "grown": (grown, "3.weight"),
    "unfrozen": (unfrozen, "0.bias"),
}


@pytest.mark.parametrize("how", ["collect", "fisher"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_are_new_are_named(change, how):
    model, data, (do, name) = network(), batches(), CHANGES[change]
    model[0].bias.requires_grad_(change != "unfrozen")

    def stream():
        yield data[0]
        do(model)
        yield data[1]

    with pytest.raises(
        ValueError, match=f"model: its parameters must stay .* got a new, replaced or unfrozen '{name}'"
    ) as caught:
        if how == "fisher":
            ff.fisher(model, stream(), "diagonal", "empirical", progress=False)
        else:
            with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
                for batch in stream():
                    stats.backward(losses(model, *batch))
    assert caught.value.fisher.num_samples == 8


def test_a_batch_of_other_tensors_is_refused():
    model, data = network(), batches()
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
        stats.backward(losses(model, *data[0]))
        with pytest.raises(ValueError, match="must depend on the model's parameters, got one that none of them reaches"):
            stats.backward(torch.func.functional_call(model, others, (data[1][0],)).square().sum(1))


class Either(nn.Module):
    """One expert for all samples: the sign of the first number chooses."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

    def forward(self, x):
        return self.experts[int(x[0, 0] > 0)](x)


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_what_was_missing_in_the_first_batch_stays_so_with_a_warning(structure):
    model, data = Either().double(), batches()
    for (x, _), sign in zip(data, (1, 1, -1), strict=True):
        x[0, 0] = sign
    same = ff.fisher(model, data[:2], structure, "empirical", progress=False, allow_missing=True)
    assert "missing" in same.coverage["experts.0.weight"]
    with pytest.warns(ff.FisherWarning, match=r"experts\.0\.\w+: should reach the loss in the first batch, or in none"):
        late = ff.fisher(model, data, structure, "empirical", progress=False, allow_missing=True)
    assert late.num_samples == 24 and "experts.0.weight" not in late.names


class Experts(nn.Module):
    """Experts whose biases are taken by a number in a tensor, as in GPT-OSS."""

    def __init__(self):
        super().__init__()
        self.gate, self.weight, self.bias = nn.Linear(6, 2), nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        chosen, out = self.gate(x).argmax(-1), self.gate(x).sum(-1, keepdim=True).expand(-1, 4)
        for expert in torch.arange(2):
            rows = torch.where(chosen == expert)[0]
            out = out.index_add(0, rows, x[rows] @ self.weight[expert] + self.bias[expert])
        return out


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
def test_a_bias_taken_by_a_number_in_a_tensor(structure):
    model, data = Experts().double(), batches()
    expected = oracle.diagonal(model, data, oracle.cross_entropy)
    found = ff.fisher(model, data, structure, "empirical", progress=False)
    if structure != "kfac":
        assert found.trace() == pytest.approx(float(sum(f.sum() for f in expected.values())))
    assert oracle.error({"bias": found.diagonal(dtype=torch.float64)["bias"]}, {"bias": expected["bias"]}) < EXACT


class Standardised(nn.Conv2d):
    """As in Big Transfer: the statistics are those of the weight."""

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


def test_a_standardised_weight_is_no_batch_statistic():
    model = nn.Sequential(Standardised(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double()
    data = [(torch.randn(5, 2, 5, 5).double(), torch.randint(0, 3, (5,)))]
    found = ff.fisher(model, data, "diagonal", "empirical", progress=False)
    assert found.coverage["0.weight"].startswith("chain: ")
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, data, oracle.cross_entropy)) < EXACT


def test_one_sample_of_an_image_norm_in_odd_strides_is_as_one_of_many():
    """torch's own gradient is wrong for it: the parts of a batch are the measure here."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Linear(36, 3)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).flatten(2).transpose(1, 2).flatten(1).relu())

    model, x, y = Patches().double().eval(), torch.randn(4, 2, 3, 3).double(), torch.randint(0, 3, (4,))
    together, alone = (
        ff.fisher(model, list(zip(x.split(n), y.split(n), strict=True)), "diagonal", "empirical", progress=False).diagonal(
            dtype=torch.float64
        )
        for n in (4, 1)
    )
    assert oracle.error(alone, together) < EXACT


def test_compiled_functions_compile_after_several_threads_have_measured():
    ready = threading.Barrier(3)

    def measure():
        model, data = network(), batches()
        with ff.collect(model, ff.Diagonal(), fisher_type="empirical") as stats:
            for batch in data:
                ready.wait(timeout=60)
                stats.backward(losses(model, *batch))

    compiled = []
    function = torch.compile(lambda x: 2 * x + 1, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    threads = [threading.Thread(target=measure) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    function(torch.ones(3))
    assert len(compiled) == 1


def test_what_cannot_be_measured_says_why():
    model, data = network(), batches(1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"must be measured outside torch\.inference_mode\(\)"):
        ff.fisher(model, data, progress=False)
    with pytest.warns(ff.FisherWarning, match="of the 8 samples must have a label that counts, got none"):
        zero = ff.fisher(model, [(data[0][0], torch.full((8,), -100))], "diagonal", "empirical", progress=False)
    assert zero.trace() == 0
    with ff.collect(model, ff.Diagonal(), ff.PerSampleNorm(), fisher_type="empirical") as stats:
        stats.backward(losses(model, *data[0]))
    with pytest.raises(ValueError, match=r"result\(\) must be used with exactly one structure, got 2; use results\(\)"):
        stats.result()
    model[2].bias.data[1] = float("nan")
    with pytest.raises(ff.NonFiniteError, match=r"the parameter '2\.bias' itself is not finite"):
        ff.fisher(model, data, progress=False)


def twice():
    """One module under two names, and a parameter that no rule covers."""
    layer = nn.Linear(4, 4)
    power = networks.Wrapped(lambda m, x: (x.abs() + 1) ** m.b, b=nn.Parameter(torch.tensor(1.5)))
    return nn.Sequential(layer, nn.Tanh(), layer, power, nn.Linear(4, 3)).double()


@pytest.mark.parametrize("run", ["fisher", "expected_loss", "variational_posterior", "activation_noise"])
def test_a_module_under_two_names_keeps_its_parameters(run):
    model, data = twice(), [(torch.randn(5, 4).double(), torch.randint(3, (5,)))]
    before = dict(model.named_parameters())
    fisher = ff.fisher(model, data, fisher_type="empirical", progress=False)
    expected = oracle.diagonal(model, data, oracle.cross_entropy)
    assert oracle.error(fisher.diagonal(dtype=torch.float64), expected) < 1e-9
    if run == "expected_loss":
        ff.expected_loss(ff.optimal_posterior(fisher, model, prior_scale=1.0, beta=0.1), model, data, draws=2)
    elif run == "variational_posterior":
        ff.variational_posterior(model, data, beta=0.1, prior_scale=1.0, epochs=1)
    elif run == "activation_noise":
        ff.activation_noise(model, data[0][0][:2], fisher, beta=0.1, prior_scale=1.0)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)


class Keeps(nn.Module):
    """Keeps what it makes of its parameters, ``make(model, N)``, for later forward passes with as many rows."""

    def __init__(self, make):
        super().__init__()
        self.make, self.kept = make, None
        self.a, self.o, self.f, self.table = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(2, 5), nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        if self.kept is None or len(self.kept) not in (1, len(x)):
            self.kept = self.make(self, len(x))
        return self.o((self.a(x) + self.kept).tanh() + self.f.weight.sum(1) + self.f.bias + self.table.sum(0))


def a_row(m, _):
    return m.f(torch.ones(1, 2).double())


def a_row_for_each_sample(m, N):
    return a_row(m, N).expand(N, -1)


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("make", [a_row, a_row_for_each_sample])
def test_what_an_earlier_forward_pass_made_is_named(make, size):
    data = [(torch.randn(size, 4).double(), torch.randint(3, (size,))) for _ in range(8 // size)]
    with pytest.raises(ValueError, match=r"must not keep tensors made of its parameters .* got one made of 'f\.weight'"):
        ff.fisher(Keeps(make).double(), data, fisher_type="empirical", progress=False)


@pytest.mark.parametrize("warm", [False, True])
def test_a_table_looked_up_once_is_kept(warm):
    """As the attention biases of LeViT in eval mode."""
    model = Keeps(lambda m, _: m.table[:, torch.tensor([0, 2, 4, 1, 3])].sum(0, keepdim=True)).double()
    data = [(torch.randn(4, 4).double(), torch.randint(3, (4,))) for _ in range(2)]
    if warm:
        model(data[0][0])
    found = ff.fisher(model, data, fisher_type="empirical", progress=False).diagonal(dtype=torch.float64)
    model.kept = None
    assert oracle.error(found, oracle.diagonal(model, data, oracle.cross_entropy)) < EXACT
