# SPDX-License-Identifier: Apache-2.0
"""What else runs beside a measurement: other models, other collects, a compiler, transforms. The numbers are autograd's, or an error says
what to do.
"""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fisherfast as ff

N, I, H, C = 6, 4, 5, 3
EXACT = 1e-12


def mlp(dtype=torch.float64):
    return nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.Linear(H, C)).to(dtype).eval()


def batches(dtype=torch.float64):
    return [(torch.randn(n, I, dtype=dtype), torch.randint(C, (n,))) for n in (N, N, N - 1)]


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measured(model, data, beside, **options):
    """The diagonal of a collect in which ``beside`` runs before every batch, against autograd's."""
    with ff.collect(model, "diagonal", **options) as stats:
        for x, y in data:
            beside(x, y)
            stats.backward(losses(model, x, y))
    expected = oracle.diagonal(model, data, oracle.cross_entropy)
    return oracle.error(stats.result().diagonal(dtype=torch.float64), expected)


def trained(*layers):
    student = nn.Sequential(nn.Linear(I, H), *layers, nn.Linear(H, C)).double().train()
    return lambda x, y: F.cross_entropy(student(x), y).backward()


def by_reentrant_checkpoint(x, y):
    student = nn.Sequential(nn.Linear(I, H), nn.Dropout(0.5)).double()
    F.dropout(checkpoint(student, x.clone().requires_grad_(), use_reentrant=True), 0.5).sum().backward()


@torch.no_grad()
def monte_carlo(x, y):
    nn.Sequential(nn.Linear(I, H), nn.Dropout(0.5)).double()(x)


BESIDE = {
    "a student with dropout": trained(nn.Dropout(0.5)),
    "a student with batch statistics": trained(nn.BatchNorm1d(H)),
    "a student with a reentrant checkpoint": by_reentrant_checkpoint,
    "dropout of another model without a graph": monte_carlo,
    "dropout of the inputs": lambda x, y: F.dropout(x, 0.1),
    "gumbel_softmax": lambda x, y: F.gumbel_softmax(x),
    "random slopes": lambda x, y: F.rrelu(x, training=True),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_chance_outside_of_the_model_is_nobodys(beside):
    assert measured(mlp(), batches(), BESIDE[beside]) < EXACT


def dropped_weight(model, x):
    return F.linear(x, F.dropout(model[0].weight), model[0].bias) @ model[2].weight.T + model[2].bias


def by_fallback(model, x):
    return F.dropout(model(x) + torch.linalg.det(model[0].weight[:, :H] @ model[0].weight[:, :H].T))


INSIDE = {
    "in the loss": lambda model, x: F.dropout(model(x), 0.5),
    "in a function between layers": lambda model, x: model[2](F.dropout(model[1](model[0](x)), 0.5)),
    "of a function without modules": lambda model, x: F.linear(F.dropout(F.linear(x, model[0].weight)), model[2].weight),
    "of a parameter": dropped_weight,
    "of what no rule covers": by_fallback,
}


@pytest.mark.parametrize("how", INSIDE)
def test_chance_on_the_way_from_a_parameter_is_refused(how):
    model, (x, _) = mlp(), batches()[0]
    with ff.collect(model, "diagonal"), pytest.raises(ValueError, match="model: must not draw dropout"):
        INSIDE[how](model, x)


def test_chance_in_the_model_is_refused_without_a_graph_too():
    model = mlp().append(nn.Dropout(0.5).eval())
    with ff.collect(model, "diagonal"), torch.no_grad(), pytest.raises(ValueError, match="model: must not draw dropout"):
        model.train()(torch.randn(N, I).double())


class Method(nn.Module):
    """Its own method drops entries of the input, before any parameter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(I, C)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, True))

    def other(this, x):
        return this.layer(F.dropout(x, 0.5, True))


@pytest.mark.parametrize("call", [Method.forward, Method.other])
def test_chance_in_a_method_that_is_called_by_its_name_is_refused(call):
    model = Method().eval()
    with ff.collect(model, "diagonal"), pytest.raises(ValueError, match="model: must not draw dropout"):
        call(model, torch.randn(N, I))


def selective(policy):
    return lambda: create_selective_checkpoint_contexts(lambda ctx, op, *_, **__: policy)


class Checkpointed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.m, self.options = mlp(), options

    def forward(self, x):
        return self.m[2](checkpoint(lambda h: torch.tanh(self.m[0](h)), x, **self.options))


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE], ids=["saved", "nothing"])
def test_selective_checkpointing_is_right_or_refused(policy, structure):
    model, data = Checkpointed(use_reentrant=False, context_fn=selective(policy)), batches()
    if policy is CheckpointPolicy.PREFER_RECOMPUTE:
        model.m.load_state_dict((plain := mlp()).state_dict())
        found = ff.fisher(model, data, structure=structure, progress=False).diagonal()
        expected = ff.fisher(plain, data, structure=structure, progress=False).diagonal()
        assert oracle.error({name[2:]: of for name, of in found.items()}, expected) < EXACT
        return
    with pytest.raises(ValueError, match=r"selective activation checkpointing.*leave out context_fn"):
        ff.fisher(model, data, structure=structure, progress=False)
    with ff.collect(model, structure) as stats, pytest.raises(ValueError, match="leave out context_fn"):
        stats.backward(losses(model, *data[0]))


def test_reentrant_checkpointing_of_inputs_without_a_gradient_is_named():
    model, data = Checkpointed(use_reentrant=True), batches()
    with pytest.raises(ValueError, match=r"got 2 of 4 that were used where autograd keeps no graph.*pass use_reentrant=False"):
        ff.fisher(model, data, progress=False)
    missing = ff.fisher(model, data, allow_missing=True, progress=False).coverage
    assert missing["m.0.weight"] == "missing: it is used where autograd keeps no graph"


def test_measuring_inside_compiled_functions():
    model, data = mlp(), batches()
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def trace():
        return ff.fisher(model, data, progress=False).trace()

    @torch.compile(backend="eager")
    def planned():
        return ff.plan(model, data[0]).total_bytes

    @torch.compile(backend="eager")
    def collected():
        with ff.collect(model, "diagonal") as stats:
            stats.backward(losses(model, *data[0]))

    assert trace() == ff.fisher(model, data, progress=False).trace()
    assert planned() == ff.plan(model, data[0]).total_bytes
    with pytest.raises(ValueError, match=r"decorate .* with torch\.compiler\.disable"):
        collected()
    assert measured(model, data, lambda x, y: None) < EXACT  # and nothing is left of it
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2


def test_two_collects_of_one_parameter_are_told_to_be_one():
    body, head = mlp(), nn.Linear(C, C).double()
    whole, (x, y) = nn.Sequential(body, head), batches()[0]
    message = r"must be caught by one collect.*give all structures to one"
    with ff.collect(body, "diagonal") as outer, ff.collect(body, "kfac"), pytest.raises(ValueError, match=message):
        outer.backward(losses(body, x, y))
    with ff.collect(whole, "diagonal", allow_missing=True) as outer, ff.collect(body, "diagonal") as inner:
        logits = body(x)
        inner.backward(F.cross_entropy(logits, y, reduction="none"), retain_graph=True)
        with pytest.raises(ValueError, match=message):
            outer.backward(F.cross_entropy(head(logits), y, reduction="none"))


def test_a_later_batch_caught_by_another_collect_is_no_zero():
    body, head = mlp(), nn.Linear(C, C).double()
    whole, (x, y) = nn.Sequential(body, head), batches()[0]
    with ff.collect(whole, "diagonal") as outer:
        outer.backward(losses(whole, x, y))
        with ff.collect(body, "diagonal"), pytest.raises(ValueError, match="must be caught by one collect"):
            outer.backward(losses(whole, x, y))


def test_collects_of_two_models_and_of_one_inside_another():
    teacher, student, data = mlp(), mlp(), batches()
    with ff.collect(teacher, "diagonal") as a, ff.collect(student, "diagonal") as b:
        for x, y in data:
            a.backward(losses(teacher, x, y))
            b.backward(losses(student, x, y))
            inside = ff.fisher(teacher, data, fisher_type="empirical", progress=False)
    for model, found in ((teacher, a.result()), (student, b.result()), (teacher, inside)):
        assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, data, oracle.cross_entropy)) < EXACT


def test_parameters_of_inference_mode_have_a_way_out():
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match=r"0.weight: .* made in inference mode; .* copy.deepcopy it there"):
        ff.fisher(model, batches(), progress=False)
    model, data = copy.deepcopy(model), batches()
    found = ff.fisher(model, data, fisher_type="empirical", progress=False)
    assert oracle.error(found.diagonal(dtype=torch.float64), oracle.diagonal(model, data, oracle.cross_entropy)) < EXACT


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_inputs_of_inference_mode_are_copied(structure):
    model, data = mlp(), batches()
    with torch.inference_mode():
        inferred = [(x * 1, y * 1) for x, y in data]
    found, expected = (ff.fisher(model, one, structure=structure, progress=False) for one in (inferred, data))
    assert torch.equal(found.diagonal()["0.weight"], expected.diagonal()["0.weight"])


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: torch.func.grad(f)(torch.ones(())),
        lambda f: torch.func.vmap(f)(torch.ones(2)),
        lambda f: torch.func.jvp(f, (torch.ones(()),), (torch.ones(()),)),
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_transforms_are_asked_to_let_the_measurement_be(transformed):
    model, data = mlp(), batches()
    message = "must be measured outside of"
    with pytest.raises(ValueError, match=message):
        transformed(lambda a: a * ff.fisher(model, data, progress=False).trace())
    with pytest.raises(ValueError, match=message):
        transformed(lambda a: a * ff.collect(model, "diagonal").results())


def test_too_large_a_loss_scale_is_told_from_the_first_batch_on():
    model, (x, y) = mlp(torch.float32), batches(torch.float32)[0]
    with ff.collect(model, "diagonal", loss_scale=2.0**24) as stats, torch.autocast("cpu", torch.float16):
        with pytest.raises(ff.NonFiniteError, match=r"batch 0: gradients must be finite.*give a lower loss_scale"):
            stats.backward(losses(model, x, y))


def test_a_gradient_that_is_not_finite_is_no_row_of_several_samples():
    model, (x, _) = mlp(), batches()[0]
    with ff.collect(model, "diagonal") as stats:
        with pytest.raises(ff.NonFiniteError, match="batch 0: gradients must be finite"):
            logits = model(x)
            stats.backward((logits - logits.detach()).sqrt().sum(1))
