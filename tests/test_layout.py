# SPDX-License-Identifier: Apache-2.0
"""The sample axis is found from which rows react to which losses, for every layout, and never guessed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfast.layout import PROBED, Evidence, Kind, Layout, candidates, masks


def evidence(owner, N, features=3):
    """What the probe sees when row r belongs to sample owner[r] (-1: to none, -2: to all)."""
    seen = Evidence()
    for mask in masks(N, torch.device("cpu")):
        reacts = torch.where(owner == -2, mask.any(), (owner >= 0) & mask[owner.clamp_min(0)].bool())
        seen.see(reacts.unsqueeze(-1) * torch.rand(*owner.shape, features).add(0.5), mask)
    return seen


@given(N=st.integers(2, 40))
def test_masks_tell_the_first_samples_apart(N):
    subsets = list(masks(N, torch.device("cpu")))
    few = min(N, PROBED)
    for a in range(few):
        for b in range(N):
            assert a == b or any(m[a] == 1 and m[b] == 0 for m in subsets)
    assert all(not m[few:].any() for m in subsets) and len(subsets) <= 4


@settings(deadline=None)
@given(N=st.integers(2, 9), T=st.integers(1, 9), kind=st.sampled_from(["NT", "TN", "N*T", "T*N"]))
def test_every_layout_is_found_and_brings_samples_first(N, T, kind):
    sample = torch.arange(N).view(N, 1).expand(N, T)
    position = torch.arange(T).expand(N, T)
    rows = torch.stack([sample, position], -1)  # [N, T, 2]
    rows = rows if kind in ("NT", "N*T") else rows.transpose(0, 1)
    rows = rows.flatten(0, 1) if "*" in kind else rows
    seen = evidence(rows[..., 0], N)
    assert seen.layout is not None
    assert torch.equal(seen.layout.samples_first(rows, N), torch.stack([sample, position], -1))


def test_dead_rows_do_not_hide_the_layout():
    owner = torch.full((4, 8), -1)
    owner[:, 0] = torch.arange(4)  # only a class token's row reaches the loss
    assert evidence(owner, 4).layout == Layout(0, Kind.AXIS)


def test_square_batches_are_told_from_their_transpose():
    owner = torch.arange(5).expand(5, 5)
    assert evidence(owner, 5).layout == Layout(1, Kind.AXIS)


def test_rows_of_several_samples_fit_no_layout():
    seen = evidence(torch.full((6, 4), -2), 4)
    assert seen.mixes_samples and seen.layout is None


def test_gathered_rows_fit_no_layout():
    seen = evidence(torch.tensor([0, 0, 2, 1, 3, 3, 1, 2]), 4)
    assert seen.mixes_samples


def test_no_gradient_is_no_evidence():
    seen = evidence(torch.full((4, 3), -1), 4)
    assert seen.layout is None and not seen.mixes_samples


@pytest.mark.parametrize("lead", [(4,), (4, 3), (3, 4), (8,), (4, 4)])
def test_candidates_name_no_layout_twice(lead):
    rows = torch.arange(torch.Size(lead).numel()).view(*lead, 1)
    maps = [tuple(c.samples_first(rows, 4).flatten().tolist()) for c in candidates(lead, 4)]
    assert len(set(maps)) == len(maps)
