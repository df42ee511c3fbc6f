# SPDX-License-Identifier: Apache-2.0
"""A likelihood of one's own, from its log-probability."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fisherfast import _random
from fisherfast.likelihood._tensors import existing_positions
from fisherfast.likelihood.protocol import Predictions


class Draws:
    """Random numbers for the labels of a batch, handed to ``LogLikelihood.sample``.

    Each is a function of (seed, number of the sample in the run, index within the sample, draw, how many were asked for
    before): it depends neither on the batch nor on its order, nor on padding where the first axis asked for is that of the
    positions. Anything else that draws (torch's global generator) would make the result depend on the batches.
    """

    def __init__(self, predictions: Predictions, seed: int, draw: int) -> None:
        self._predictions, self._seed, self._draw = predictions, seed, draw
        self._asked = 0

    def _keys(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        sample, rank = self._predictions.keys()
        N, L = rank.shape
        inner = torch.arange(math.prod(shape), device=rank.device).expand(N, -1)
        if shape and shape[0] == L:
            rest = math.prod(shape[1:])
            inner = (rank.unsqueeze(2) * rest + torch.arange(rest, device=rank.device)).reshape(N, L * rest)
        return sample[:, :1].expand_as(inner), inner

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in (0, 1), ``[N, *shape]`` float64."""
        sample, index = self._keys(shape)
        self._asked += 1
        return _random.uniform(self._seed, sample, index, self._draw, stream=self._asked).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, ``[N, *shape]`` float64."""
        return _random.box_muller(self.uniform(*shape), self.uniform(*shape))


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """A likelihood from ``log p``: any distribution whose log-probability torch can differentiate.

    ``log_prob(output, y)``: one number per sample ``[N]``, or one per position ``[N, L]`` (added over the positions where the
    batch's attention mask is not zero); ``output`` is the model's, sample axis first, and no sample may look at another.
    ``sample(output, draws)``: labels drawn from the model, in the form that ``log_prob`` takes; ``draws.uniform(*shape)`` and
    ``draws.normal(*shape)`` give ``[N, *shape]`` random numbers. Only ``fisher_type="mc"`` needs it.
    ``columns_of(output)``: the columns of a square root of the Hessian of ``-log p`` at the output, each like the output, for
    ``fisher_type="exact"``. ``name`` is stored with the result: choose one per distribution, since results of one name pool.

    Shapes:   output ``[N, ...]``, targets whatever ``log_prob`` takes, samples first.
    Scale:    the gradient of ``-log p``, summed over the positions of a sample.
    Errors:   ValueError where ``log_prob`` returns another shape or does not depend on the output, and for a fisher_type whose
              function was not given.
    Numerics: autograd, in the output's dtype.
    Source:   the definition of the score.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Draws], Tensor] | None = None
    columns_of: Callable[[Tensor], Iterable[Tensor]] | None = None
    name: str = field(kw_only=True)

    def predictions(self, output: Tensor, targets: Tensor | None, mask: Tensor | None, sample: Tensor) -> Predictions:
        """See ``Likelihood``."""
        samples = torch.ones(len(output), 1, dtype=torch.bool, device=output.device)
        positions = existing_positions(output, mask)
        if positions is None or not self._is_of_positions(Predictions(output.detach(), targets, positions, sample)):
            return Predictions(output, targets, samples, sample)
        return Predictions(output, targets, positions, sample)

    def _is_of_positions(self, predictions: Predictions) -> bool:
        """Whether ``log_prob`` is of each position ``[N, L]``, not of each sample: the mask may have the output's shape by chance."""
        if self.sample is not None:
            y = self.sample(predictions.values, Draws(predictions, 0, 0))
        elif predictions.targets is not None:
            y = predictions.targets
        elif bool(predictions.counted.all()):
            return True  # it does not matter
        else:
            raise ValueError(
                f"{self.name}: log_prob must be known to return [N] or [N, L] beside an attention mask of the output's first axes, "
                f"{tuple(predictions.counted.shape)}, got neither labels nor LogLikelihood(sample=...) to ask it with; pass one of them"
            )
        return self.log_prob(predictions.values, y).dim() == 2

    def _score(self, predictions: Predictions, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = predictions.values.detach().requires_grad_()
            score = torch.autograd.grad(-self._log_p(replace(predictions, values=leaf), y).sum(), leaf)[0]
        if predictions.counted.shape != score.shape[:2]:
            return score  # of samples, all of which count
        # Labels of padding may be anything, also NaN, of which autograd makes 0 * NaN.
        left_out = ~predictions.counted.view(*predictions.counted.shape, *[1] * (score.dim() - 2))
        return score.masked_fill(left_out & score.isnan(), 0.0)

    def _log_p(self, predictions: Predictions, y: Tensor) -> Tensor:
        """What ``log_prob`` says of each sample, checked and added over its positions: ``[N]``."""
        log_p = self.log_prob(predictions.values, y)
        N, L = predictions.counted.shape
        fits = log_p.shape[:1] == (N,) and (log_p.dim() == 1 or (log_p.dim() == 2 and L in (1, log_p.shape[1])))
        lacks_graph = predictions.values.requires_grad and not log_p.requires_grad
        if not fits or lacks_graph:
            raise ValueError(
                f"{self.name}: log_prob must return one number per sample [N] = ({N},), or one per position [N, L], that depends "
                f"on the output through autograd, got shape {tuple(log_p.shape)}" + (" without a graph" if lacks_graph else "")
            )
        return log_p.masked_fill(~predictions.counted, 0.0).sum(1) if log_p.dim() == 2 else log_p

    def losses(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: ``-log_prob``."""
        assert predictions.targets is not None
        return -self._log_p(predictions, predictions.targets)

    def empirical(self, predictions: Predictions) -> Tensor:
        """See ``Likelihood``: by autograd."""
        assert predictions.targets is not None
        return self._score(predictions, predictions.targets)

    def sampled(self, predictions: Predictions, seed: int, draw: int) -> Tensor:
        """See ``Likelihood``: by autograd, for labels from ``sample``."""
        if self.sample is None:
            raise ValueError(f"{self.name}: fisher_type='mc' needs LogLikelihood(sample=...), got None; or use 'empirical'")
        return self._score(predictions, self.sample(predictions.values.detach(), Draws(predictions, seed, draw)))

    def num_columns(self, predictions: Predictions) -> int:
        """See ``Likelihood``."""
        return sum(1 for _ in self.columns(predictions))

    def columns(self, predictions: Predictions) -> Iterator[Tensor]:
        """See ``Likelihood``: those of ``columns_of``."""
        if self.columns_of is None:
            raise ValueError(
                f"{self.name}: fisher_type='exact' needs LogLikelihood(columns_of=...), got None; use fisher_type='mc' with draws"
            )
        values = predictions.values.detach()
        made = self.columns_of(values)
        if not isinstance(made, Iterable):
            raise TypeError(f"{self.name}: columns_of must give columns, got {type(made).__name__}")
        for column in made:
            if column.shape != values.shape:
                raise ValueError(
                    f"{self.name}: columns_of must yield columns like the output {tuple(values.shape)}, got {tuple(column.shape)}"
                )
            if predictions.counted.shape[1] > 1:
                column = column.masked_fill(~predictions.counted.view(*values.shape[:2], *[1] * (values.dim() - 2)), 0.0)
            yield column.to(values.dtype)
