# SPDX-License-Identifier: Apache-2.0
"""A likelihood of one's own beside an attention mask: the mask is of positions only where ``log_prob`` is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfast as ff

K = 3


class Heteroscedastic(nn.Module):
    """Mean and log of the standard deviation of K numbers of each sample, from the mean over its words: ``[N, K, 2]``."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 2 * K)

    def forward(self, ids, attention_mask):
        weights = attention_mask / attention_mask.sum(1, keepdim=True)
        return self.head((self.words(ids) * weights[..., None]).sum(1)).view(-1, K, 2)


def normal_log_prob(output, y):
    return torch.distributions.Normal(output[..., 0], output[..., 1].exp()).log_prob(y).sum(1)


def normal_columns(output):
    for k in range(K):
        for column, value in ((0, (-output[:, k, 1]).exp()), (1, torch.full_like(output[:, k, 1], 2**0.5))):
            made = torch.zeros_like(output)
            made[:, k, column] = value
            yield made


@pytest.mark.parametrize("fisher_type", ["exact", "mc", "empirical"])
def test_a_mask_of_the_outputs_shape_by_chance_masks_no_output_of_a_sample(fisher_type):
    """log_prob returns ``[N]``, so the second axis of the output is not positions, however far the batch is padded."""
    model = Heteroscedastic().double().eval()
    ids, length, y = torch.randint(1, 20, (4, 2)), torch.tensor([1, 2, 2, 1]), torch.randn(4, K)
    own = ff.LogLikelihood(
        normal_log_prob, lambda z, draws: z[..., 0] + z[..., 1].exp() * draws.normal(K), normal_columns, name="heteroscedastic"
    )
    found = []
    for T in (K - 1, K, K + 1):
        mask = (torch.arange(T) < length[:, None]).long()
        batch = {"ids": F.pad(ids, (0, T - 2)), "attention_mask": mask, "labels": y}
        found.append(ff.fisher(model, [batch], fisher_type=fisher_type, likelihood=own, progress=False))
    assert [one.num_positions for one in found] == [4] * 3
    assert [one.trace() for one in found] == pytest.approx([found[0].trace()] * 3, rel=1e-12)


def test_without_labels_or_sample_nobody_knows_what_log_prob_is_of():
    model, mask = Heteroscedastic().eval(), torch.tensor([[1, 1, 1], [1, 0, 0]])
    own = ff.LogLikelihood(normal_log_prob, columns_of=normal_columns, name="heteroscedastic")
    batch = {"ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask}
    with pytest.raises(ValueError, match=r"log_prob must be known to return \[N\] or \[N, L\] beside an attention mask"):
        ff.fisher(model, [batch], fisher_type="exact", likelihood=own, progress=False)
    ff.fisher(model, [{**batch, "attention_mask": torch.ones_like(mask)}], fisher_type="exact", likelihood=own, progress=False)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, K)

    def forward(self, ids, attention_mask):
        return self.head(self.words(ids).tanh())


def test_labels_of_padding_may_be_nan():
    """As a named likelihood's may: autograd makes 0 * NaN of what does not count."""
    model, ids = Words().double(), torch.randint(1, 20, (3, 4))
    mask = (torch.arange(4) < torch.tensor([4, 2, 3])[:, None]).long()
    y = torch.randn(3, 4, K).double().masked_fill(mask[..., None] == 0, float("nan"))
    own = ff.LogLikelihood(lambda z, y: -(z - y).square().sum(2) / 2, name="unit normal")
    batch = {"ids": ids, "attention_mask": mask, "labels": y}
    found, true = (
        ff.fisher(model, [batch], fisher_type="empirical", likelihood=each, progress=False).diagonal(dtype=torch.float64)
        for each in (own, ff.Gaussian(1.0))
    )
    for name, values in true.items():
        torch.testing.assert_close(found[name], values, rtol=1e-12, atol=0)
