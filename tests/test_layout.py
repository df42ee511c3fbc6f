# SPDX-License-Identifier: Apache-2.0
"""Samples are found from the factors that tagged passes give their rows, for every layout, and never guessed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfast.capture.layout import MIXED, UNKNOWN, Finding, Gathered, Kind, Layout, Sightings, Tags, candidates

CPU = torch.device("cpu")


def numbers(owner, N, few=None, dtype=torch.float32, features=3):
    """What tags tell when row r belongs to sample owner[r] (UNKNOWN: to none, MIXED: to all)."""
    tags = Tags(N, few or N, dtype == torch.float16)
    plain = torch.rand(*owner.shape, N, features).add(0.5)  # what each sample's loss would give each row
    belongs = torch.where(owner.unsqueeze(-1) == MIXED, True, owner.unsqueeze(-1) == torch.arange(N))
    plain = plain * belongs.unsqueeze(-1)
    sightings = Sightings(tags)
    for factor in tags.factors(CPU):
        sightings.see((plain * factor.view(-1, 1)).sum(-2).to(dtype), 1)
    looked_at = (torch.arange(N) < tags.few).view(-1, 1)
    return sightings.numbers((plain * looked_at).sum(-2).to(dtype), 1)


def finding(owner, N, few=None):
    return Finding.of(numbers(owner, N, few), N)


@settings(deadline=None, max_examples=50)
@given(
    N=st.sampled_from([1, 2, 3, 4, 5, 31, 32, 33, 63, 1023, 1025]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_row_is_told_its_sample(N, dtype):
    owner = torch.randint(0, N, (29,))
    owner[3] = UNKNOWN
    assert torch.equal(numbers(owner, N, dtype=dtype), owner)


@pytest.mark.parametrize("N", [2, 4, 40])
def test_rows_of_several_samples_are_told(N):
    owner = torch.arange(6) % N
    owner[2] = MIXED
    assert torch.equal(numbers(owner, N), owner)


def test_a_trace_of_another_sample_is_seen():
    """A billionth of another sample in a row, far below rounding in the row itself, is not taken for one sample's row."""
    tags = Tags(4, 4)
    rows = torch.zeros(1, 4, 3, dtype=torch.float64)
    rows[0, 0], rows[0, 3] = 1.0, 1e-9
    sightings = Sightings(tags)
    for factor in tags.factors(CPU):
        sightings.see((rows * factor.view(-1, 1)).sum(1), 1)
    assert sightings.numbers(rows.sum(1), 1).item() == MIXED


def test_samples_on_entries_of_their_own_are_mixed():
    """The largest entry alone would name the second sample: it is the larger with any tags."""
    tags = Tags(2, 4)
    rows = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    sightings = Sightings(tags)
    for factor in tags.factors(torch.device("cpu")):
        sightings.see((rows * factor.view(-1, 1).float()).sum(0, keepdim=True), 1)
    assert sightings.numbers(rows.sum(0, keepdim=True), 1).item() == MIXED


def test_samples_that_are_not_looked_at_stay_unknown():
    owner = torch.arange(9)
    assert torch.equal(numbers(owner, 9, few=4), owner.where(owner < 4, UNKNOWN))


def test_rows_of_samples_that_no_tag_looks_at_are_nobodys():
    tags, rows, owner = Tags(9, 4), torch.rand(9, 3).add(0.5), torch.arange(9)
    sightings = Sightings(tags)
    for factor in tags.factors(CPU):
        sightings.see(rows * factor.view(-1, 1).float(), 1)
    assert torch.equal(sightings.numbers(rows, 1), owner.where(owner < 4, UNKNOWN))


@settings(deadline=None)
@given(N=st.integers(2, 9), T=st.integers(1, 9), kind=st.sampled_from(["NT", "TN", "N*T", "T*N"]), few=st.booleans())
def test_every_layout_is_found_and_brings_samples_first(N, T, kind, few):
    sample = torch.arange(N).view(N, 1).expand(N, T)
    position = torch.arange(T).expand(N, T)
    rows = torch.stack([sample, position], -1)  # [N, T, 2]
    rows = rows if kind in ("NT", "N*T") else rows.transpose(0, 1)
    rows = rows.flatten(0, 1) if "*" in kind else rows
    found = finding(rows[..., 0], N, 4 if few else None)
    assert found.layout is not None
    assert torch.equal(found.layout.samples_first(rows, N), torch.stack([sample, position], -1))


def test_images_keep_their_axes():
    images = torch.arange(6 * 2 * 3 * 4).view(6, 2, 3, 4)
    assert torch.equal(Layout(0, Kind.AXIS).samples_first(images, 6, features=3), images.unsqueeze(1))
    assert torch.equal(Layout(0, Kind.SAMPLE_MAJOR).samples_first(images, 3, features=3), images.view(3, 2, 2, 3, 4))
    assert torch.equal(
        Layout(0, Kind.SAMPLE_MINOR).samples_first(images, 3, features=3), images.view(2, 3, 2, 3, 4).transpose(0, 1)
    )


def test_packed_rows_are_those_between_the_offsets():
    offsets, owner = torch.tensor([0, 5, 6, 8]), torch.tensor([0] * 5 + [1] + [2] * 2)
    layout = Layout(0, Kind.PACKED)
    assert torch.equal(layout.sample_of_row((8,), 3, CPU, offsets), owner)
    assert Finding.of(owner, 3, offsets).layout == layout


def test_dead_rows_do_not_hide_the_layout():
    owner = torch.full((4, 8), UNKNOWN)
    owner[:, 0] = torch.arange(4)  # only a class token's row reaches the loss
    assert finding(owner, 4).layout == Layout(0, Kind.AXIS)


def test_square_batches_are_told_from_their_transpose():
    owner = torch.arange(5).expand(5, 5)
    assert finding(owner, 5).layout == Layout(1, Kind.AXIS)


def test_rows_of_several_samples_fit_no_layout():
    found = finding(torch.full((6, 4), MIXED), 4)
    assert found.mixes_samples and found.layout is None


def test_gathered_rows_fit_no_layout_and_are_brought_together():
    owner = torch.tensor([0, 0, 2, UNKNOWN, 1, 3, 3, 1, 2, 3])
    found = finding(owner, 4)
    assert found.layout is None and not found.mixes_samples
    gathered = Gathered(found.numbers, 4)
    assert gathered.offsets.tolist() == [0, 2, 4, 6, 9]
    assert gathered.packed(torch.arange(10).unsqueeze(-1)).flatten().tolist() == [0, 1, 4, 7, 2, 8, 5, 6, 9]


def test_no_gradient_is_no_evidence():
    found = finding(torch.full((4, 3), UNKNOWN), 4)
    assert found.layout is None and not found.mixes_samples


def test_rows_of_one_sample_are_no_evidence():
    """As many positions as samples, of which one has a gradient: that of the sample of its number, by chance."""
    found = finding(torch.tensor([UNKNOWN, 1, UNKNOWN]), 3)
    assert found.layout is None and not found.mixes_samples and Layout(0, Kind.AXIS) in found.possible


@pytest.mark.parametrize("lead", [(4,), (4, 3), (3, 4), (8,), (4, 4)])
def test_candidates_name_no_layout_twice(lead):
    rows = torch.arange(torch.Size(lead).numel()).view(*lead, 1)
    maps = [tuple(c.samples_first(rows, 4).flatten().tolist()) for c in candidates(lead, 4)]
    assert len(set(maps)) == len(maps)
