# SPDX-License-Identifier: Apache-2.0
"""Several uses of one parameter as one: a sum over uses is a sum over more positions, and a table that is looked up and multiplied by
has a form of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from fisherfast.ops.linear_sq import linear_sq_
from fisherfast.rules.forms import Form, Lookup, MatMul
from fisherfast.rules.rows import Rows


@dataclass(frozen=True)
class Tied(Form):
    """A table ``[V, D]`` that is both looked up and multiplied by: an embedding tied to the head.

    A sample gradient is the head's part H plus, in the rows that occur, the embedding's E: ``(H + E)^2 = H^2`` everywhere,
    ``+ 2 H E + E^2`` in those rows, whose H is a gather. Nothing of size ``[N, V, D]`` is formed. Where E = -H but for a part of
    1e-3 or less, the sum keeps few digits of it; it is never below 0.
    """

    padding_idx: int = -1
    op = "linear_sq_ + embedding_sq_"

    def flops(self, rows: Rows, shape: tuple[int, ...]) -> int:
        """See ``Form``."""
        assert rows.lookup is not None
        return 2 * rows.g.numel() * rows.inputs.shape[-1] + 2 * rows.lookup.g.numel()

    def accumulate(self, acc: Tensor, rows: Rows, scale: float, **outputs: Tensor | None) -> None:
        """See ``Form``."""
        lookup, flag = rows.lookup, outputs.get("flag")
        assert lookup is not None
        if flag is not None:  # the second op's inputs too, before the first adds anything
            flag |= ~torch.isfinite(lookup.g).all()
        linear_sq_(acc, rows.inputs, rows.g, scale, offsets=rows.offsets, **outputs)
        for n, head, table in _few_samples(rows._replace(lookup=None), lookup):
            self._add_touched(acc, n, head, table, scale, **outputs)

    def gradients(self, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        """See ``Form``."""
        assert rows.lookup is not None
        head = MatMul().gradients(rows._replace(lookup=None), shape)
        return head.add_(Lookup(self.padding_idx).gradients(rows.lookup, shape))

    def _add_touched(
        self, acc: Tensor, n: slice, head: Rows, table: Rows, scale: float, *, weight=None, total=None, sqnorm=None, flag=None
    ) -> None:
        ids = table.inputs.squeeze(-1)  # [n, U]
        dtype = acc.dtype if acc.dtype == torch.float64 else torch.float32
        same = (ids.unsqueeze(2) == ids.unsqueeze(1)).to(dtype)  # [n, U, U]
        first = ~same.tril(-1).any(-1) & (ids != self.padding_idx)
        E = torch.bmm(same, table.g.to(dtype))
        touched = head.g.gather(2, ids.unsqueeze(1).expand(-1, head.g.shape[1], -1)).to(dtype)  # [n, T, U]
        H = torch.bmm(touched.mT, head.inputs.to(dtype))
        add = (E * (2 * H + E)) * first.unsqueeze(-1)
        if flag is not None:
            add, E = (torch.where(flag == 0, t, 0.0) for t in (add, E))
        if sqnorm is not None:
            sqnorm[n] = (sqnorm[n] + add.sum((1, 2))).clamp_min(0)
        w = 1.0 if weight is None else weight[n].view(-1, 1, 1).to(dtype)
        # Unlike index_add_, index_put_ adds in a fixed order on a GPU too.
        acc.index_put_((ids,), (scale * w * add).to(acc.dtype), accumulate=True)
        acc.index_put_((ids,), acc[ids].clamp_min(0))  # where both cancel, rounding may leave less than nothing
        if total is not None:
            total.index_put_((ids,), (w * E * first.unsqueeze(-1)).to(total.dtype), accumulate=True)


def _few_samples(head: Rows, table: Rows) -> Iterator[tuple[slice, Rows, Rows]]:
    """Both uses' rows for a few samples at a time, ``[n, T, ...]``: a bounded workspace."""
    if head.offsets is None and table.offsets is None:
        T, U = head.g.shape[1], table.g.shape[1]
        step = max(1, 2**22 // max(1, U * (T + U + table.g.shape[2])))
        for start in range(0, len(head.g), step):
            few = slice(start, start + step)
            yield few, head.each(itemgetter(few)), table.each(itemgetter(few))
        return
    for n, (one, other) in enumerate(zip(head.packed().one_by_one(), table.packed().one_by_one(), strict=True)):
        yield slice(n, n + 1), one, other


def combines(forms: list[Form]) -> bool:
    """Whether the uses of one parameter, or part, in these forms can be joined."""
    lookups = [form for form in forms if isinstance(form, Lookup)]
    others = [form for form in forms if not isinstance(form, Lookup)]
    if lookups and others:
        return all(isinstance(form, MatMul) for form in others) and len(set(lookups)) == 1
    return all(forms[0].joins(form) for form in forms)


def joined(uses: list[tuple[Form, Rows]]) -> tuple[Form, Rows]:
    """All uses of one parameter, or part, as one; rows are oriented."""
    (form, rows), *more = uses
    if not more:
        return form, rows
    lookups = [rows for form, rows in uses if isinstance(form, Lookup)]
    if 0 < len(lookups) < len(uses):
        lookup = next(form for form, _ in uses if isinstance(form, Lookup))
        head = MatMul().joined([rows for form, rows in uses if not isinstance(form, Lookup)])
        return Tied(lookup.padding_idx), head._replace(lookup=lookup.joined(lookups))
    return form, form.joined([rows for _, rows in uses])
