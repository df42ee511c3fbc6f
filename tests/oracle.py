# SPDX-License-Identifier: Apache-2.0
"""The oracle: per-sample gradients by autograd, one sample at a time, squared and averaged (slow, obvious, right); how near it a result is."""

import copy

import torch
import torch.nn.functional as F


def diagonal(model, batches, losses):
    """``{name: mean over samples of the squared gradient}``; ``losses(model, x, y)`` gives ``[1]``-sample weights and losses.

    ``losses`` yields ``(weight, loss)`` pairs for one sample: one pair for the empirical Fisher, one per label with its
    probability for the exact one.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    count = 0
    for x, y in batches:
        for n in range(len(x)):
            count += 1
            for weight, loss in losses(model, x[n : n + 1], None if y is None else y[n : n + 1]):
                grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
                for name, grad in zip(named, grads, strict=True):
                    if grad is not None:
                        sums[name] += weight * grad.square()
    return {name: value / count for name, value in sums.items()}


def cross_entropy(model, x, y):
    """Empirical categorical: class axis last, summed over positions."""
    logits = model(x)
    yield 1.0, F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="sum")


def every_label(model, x, y):
    """Exact categorical: every position's every label with its probability; positions are independent given the input."""
    logits = model(x)
    for value in logits.log_softmax(-1).flatten():
        yield float(value.detach().exp()), -value


def sample_gradients(model, x, y, losses=cross_entropy):
    """For each sample, ``(weight, {name: gradient})`` of each of its labels, by autograd."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result = []
    for n in range(len(x)):
        pairs = []
        for weight, loss in losses(model, x[n : n + 1], y[n : n + 1]):
            grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            pairs.append(
                (weight, {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), grads, strict=True)})
            )
        result.append(pairs)
    return result


def layer_norms(gradients):
    """``{layer: [N]}``: the expectation over labels of the squared norm."""
    layers = {}
    for n, pairs in enumerate(gradients):
        for weight, gradient in pairs:
            for name, g in gradient.items():
                layers.setdefault(name.rpartition(".")[0], torch.zeros(len(gradients), dtype=torch.float64))[n] += (
                    weight * g.square().sum()
                )
    return layers


def error(result, expected):
    """Largest error over all parameters, relative to the largest entry of all."""
    scale = max(float(e.abs().max()) for e in expected.values())
    return max(float((result[name].double() - e.double()).abs().max()) for name, e in expected.items()) / scale


def close(a, b, tolerance):
    """Whether they have one shape and ``max|a - b| <= tolerance max|b|``, in float64. Of tensors without entries, the shape."""
    a, b = (torch.as_tensor(t, dtype=torch.float64) for t in (a, b))
    return a.shape == b.shape and (not b.numel() or bool((a - b).abs().max() <= tolerance * b.abs().max()))


def dense(F):
    """A Fisher as a matrix, column by column."""
    size = sum(layer.num_parameters for layer in F.by_layer().values())
    return torch.stack([F @ column for column in torch.eye(size, dtype=torch.float64)])


def doubled(model):
    """A float64 copy."""
    return copy.deepcopy(model).double()
