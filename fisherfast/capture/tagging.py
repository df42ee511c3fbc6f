# SPDX-License-Identifier: Apache-2.0
"""Tagged backward passes: whose each row is, where that is not known or is to be looked at again. See ``layout`` for the idea."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from fisherfast._pieces import PIECE
from fisherfast.capture.backward import Backward, Pass
from fisherfast.capture.calls import Call, Key
from fisherfast.capture.capture import Capture
from fisherfast.capture.layout import PROBED, UNKNOWN, Finding, Sightings, Tags
from fisherfast.capture.locator import Locator
from fisherfast.capture.uses import Uses


class Tagging:
    """Tagged passes on the graphs of one capture, which they keep for the passes that follow."""

    def __init__(self, capture: Capture, backward: Backward, locator: Locator) -> None:
        self._capture, self._backward, self._locator = capture, backward, locator

    def probe(self, uses: Uses, cotangent: Tensor, large: bool = False) -> dict[Key, Finding]:
        """Tag the first few samples and find out which rows of each use are whose, and their layouts.

        The root and ``cotangent`` have the sample axis first. ``large``: see ``Tags``.
        """
        root, N = uses.root, uses.root.shape[0]
        tags = Tags(N, PROBED, self._capture.narrow, large)
        one = Pass(cotangent)
        if tags.few < N:
            one = Pass(one.times(torch.arange(N, device=root.device) < tags.few))
        numbers = self._numbers(root, one, self._sightings(root, one, tags))
        findings = {key: Finding.of(found, N, self._capture.offsets) for key, found in numbers.items()}
        self._locator.learn(findings)
        return findings

    def sightings(self, root: Tensor, one: Pass, keys: set[Key]) -> dict[Key, Sightings]:
        """What tagging all samples shows of these uses' rows in a pass."""
        N = root.shape[0]
        return self._sightings(root, one, Tags(N, N, self._capture.narrow, one.loss_scale > 1), keys)

    def owners(self, root: Tensor, one: Pass, keys: set[Key]) -> dict[Key, Tensor]:
        """The samples of these uses' rows in a pass, where any has a gradient."""
        numbers = self._numbers(root, one, self.sightings(root, one, keys))
        known = torch.stack([(found != UNKNOWN).any() for found in numbers.values()]).tolist() if numbers else []
        return {key: found for (key, found), some in zip(numbers.items(), known, strict=True) if some}

    def doubtful(self, root: Tensor, one: Pass, keys: set[Key]) -> set[Key]:
        """The uses with a known layout that are to be tagged in this pass: all of them, unless a cheaper check shows that a layout holds.

        The check is one backward pass where tags would take several: half of the samples get a gradient of zero, so by a right layout all
        rows of that half are zero. Left are the uses where some are not, or whose rows do not fit the layout.
        """
        N = root.shape[0]
        if not keys or Tags(N, N, self._capture.narrow).passes == 1:
            return keys
        suspects, leaks = set(), {}
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self._locator.batches), device="cpu")
        out = torch.zeros(N, dtype=torch.bool, device="cpu").index_fill_(0, order[: N // 2], True).to(root.device)

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            for use in call.uses:
                if g is None or use.key not in keys:
                    continue
                rows = self._locator.if_it_fits(use, use.rows(g, saved), N)
                if rows is None:
                    suspects.add(use.key)
                    continue
                left_out = out if rows.offsets is None else out.repeat_interleave(rows.offsets.diff())
                leaks[use.key] = _any(rows.g, left_out)

        self._backward.run(root, one.times(~out), listen)
        found = torch.stack(list(leaks.values())).tolist() if leaks else []
        return suspects | {key for key, leaking in zip(leaks, found, strict=True) if leaking}

    def _sightings(self, root: Tensor, one: Pass, tags: Tags, keys: set[Key] | None = None) -> dict[Key, Sightings]:
        """What the tagged passes show of each use, or of those named."""
        sightings: defaultdict[Key, Sightings] = defaultdict(lambda: Sightings(tags))

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            for use in call.uses:
                if g is not None and (keys is None or use.key in keys):
                    sightings[use.key].see(use.rows(one.unscaled(g), saved).g, use.form.features)

        for factors in tags.factors(root.device):
            self._backward.run(root, one.times(factors), listen)
        return sightings

    def _numbers(self, root: Tensor, one: Pass, sightings: Mapping[Key, Sightings]) -> dict[Key, Tensor]:
        """Of each use that tagged passes saw, the sample of every row: the same pass without tags."""
        numbers: dict[Key, Tensor] = {}

        def listen(call: Call, g: Tensor | None, saved: tuple[Tensor, ...]) -> None:
            for use in call.uses:
                if g is not None and use.key in sightings:
                    rows = use.rows(one.unscaled(g), saved)
                    numbers[use.key] = sightings[use.key].numbers(rows.g, use.form.features)

        self._backward.run(root, one.cotangent, listen)
        return numbers


def _any(g: Tensor, rows: Tensor) -> Tensor:
    """Whether a number of these rows ``[N]`` of ``g`` is not zero; many of them at a time, for picked they are a copy."""
    if g.numel() <= PIECE:
        return g[rows].any()
    step = max(1, len(g) * PIECE // g.numel())
    found = torch.zeros((), dtype=torch.bool, device=g.device)
    for part, picked in zip(g.split(step), rows.split(step), strict=True):
        found |= part[picked].any()
    return found
