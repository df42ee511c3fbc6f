# SPDX-License-Identifier: Apache-2.0
"""Small networks, one for each way a parameter can be used, their data and their Fisher. Sizes are primes: no axis passes for another."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherfast as ff

N, T, I, D, C, V = 7, 5, 3, 11, 4, 13


def vectors(n=N):
    """Inputs [N, I] and one label per sample."""
    return torch.randn(n, I), torch.randint(0, C, (n,))


def double_vectors(n=6):
    """The same in float64, for ``mlp``."""
    x, y = vectors(n)
    return x.double(), y


def sequences(n=N):
    """Inputs [N, T, I] and one label per position."""
    return torch.randn(n, T, I), torch.randint(0, C, (n, T))


def one_label(n=N):
    """Inputs [N, T, I] and one label per sample."""
    return torch.randn(n, T, I), torch.randint(0, C, (n,))


def tokens(n=N, classes=C):
    """Token ids [N, T] and one label per position."""
    return torch.randint(0, V, (n, T)), torch.randint(0, classes, (n, T))


def next_tokens(n=N):
    """Token ids [N, T] and the tokens to predict."""
    return tokens(n, V)


def images(n=N):
    """Images [N, 1, 6, 6] and one label per sample."""
    return torch.randn(n, 1, 6, 6), torch.randint(0, C, (n,))


class NaNGradient(torch.autograd.Function):
    """The identity, with NaN for a gradient."""

    @staticmethod
    def forward(ctx, x):
        """A copy."""
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        """NaN."""
        return g * float("nan")


def breaking_off(x, y):
    """A batch of two samples, then an error."""
    yield x[:2], y[:2]
    raise OSError("the data are gone")


class BesideMask(nn.Module):
    """A network of x alone, with an attention mask as a second input that it does not look at."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, attention_mask):
        return self.inner(x)


class Wrapped(nn.Module):
    """A module from parts and a forward function ``f(self, *inputs)``."""

    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        """Call f."""
        return self.f(self, *inputs)


class Conv1D(nn.Module):
    """Hugging Face's GPT-2 layer: a weight stored [I, O], used by addmm on flattened rows."""

    def __init__(self, out, inp):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inp, out) / inp**0.5)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        """Flatten, addmm, restore."""
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class LlamaNorm(nn.Module):
    """RMSNorm as written in Llama: the weight enters by a product."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x):
        """weight * normalised."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def parameter(*shape):
    """A raw parameter."""
    return nn.Parameter(torch.randn(shape))


def _time_first(m, x):
    h = m.inner(m.first(x.transpose(0, 1)).tanh()).tanh()  # [T, N, D]
    return m.head(h.transpose(0, 1))


def _flattened(m, x):
    h = m.inner(m.first(x.reshape(-1, I)).tanh()).tanh()  # [N*T, D]
    return m.head(h).view(-1, T, C)


def _flattened_time_first(m, x):
    h = m.inner(x.transpose(0, 1).reshape(-1, I)).tanh()  # [T*N, D]
    return m.head(h.view(T, -1, D).transpose(0, 1))


def _class_token(m, x):
    h = torch.cat([m.cls.expand(x.shape[0], -1, -1), m.first(x)], dim=1) + m.pos
    return m.head(F.gelu(m.mix(h.transpose(1, 2)).transpose(1, 2))[:, 0])


def _positions(m, x):
    return m.head(torch.tanh(m.wte(x) + m.wpe(torch.arange(x.shape[1], device=x.device))))


def _positions_leading_one(m, x):
    return m.head(torch.tanh(m.wte(x) + m.wpe(torch.arange(x.shape[1], device=x.device).unsqueeze(0))))


def _twice(m, x):
    return m.head(m.inner(m.inner(m.first(x).tanh()).tanh()))


def _sliced_position_table(m, x):
    return m.head(torch.tanh(m.first(x) + m.pos[: x.shape[1]]))


def _mlp():
    return nn.Sequential(nn.Linear(I, D), nn.ReLU(inplace=True), nn.Linear(D, C))


# name -> (builder, data, how each kind of parameter is expected to be covered)
COVERED = {
    "mlp-inplace-relu": (_mlp, vectors),
    "linear-sequence": (lambda: nn.Sequential(nn.Linear(I, D), nn.GELU(), nn.Linear(D, C, bias=False)), sequences),
    "sequence-inplace-relu": (lambda: nn.Sequential(nn.Linear(I, D), nn.ReLU(inplace=True), nn.Linear(D, C)), sequences),
    "time-first": (lambda: Wrapped(_time_first, first=nn.Linear(I, D), inner=nn.Linear(D, D), head=nn.Linear(D, C)), sequences),
    "flattened": (lambda: Wrapped(_flattened, first=nn.Linear(I, D), inner=nn.Linear(D, D), head=nn.Linear(D, C)), sequences),
    "flattened-time-first": (lambda: Wrapped(_flattened_time_first, inner=nn.Linear(I, D), head=nn.Linear(D, C)), sequences),
    "conv1d-addmm": (lambda: nn.Sequential(Conv1D(D, I), nn.Tanh(), Conv1D(C, D)), sequences),
    "embedding": (lambda: nn.Sequential(nn.Embedding(V, D), nn.Tanh(), nn.Linear(D, C)), tokens),
    "embedding-padding": (lambda: nn.Sequential(nn.Embedding(V, D, padding_idx=2), nn.Tanh(), nn.Linear(D, C)), tokens),
    "layer-norm": (lambda: nn.Sequential(nn.Linear(I, D), nn.LayerNorm(D), nn.Tanh(), nn.Linear(D, C)), sequences),
    "rms-norm": (lambda: nn.Sequential(nn.Linear(I, D), nn.RMSNorm(D), nn.Tanh(), nn.Linear(D, C)), sequences),
    "llama-norm": (lambda: nn.Sequential(nn.Linear(I, D), LlamaNorm(D), nn.Tanh(), nn.Linear(D, C)), sequences),
    "class-token-and-table": (
        lambda: Wrapped(
            _class_token,
            first=nn.Linear(I, D),
            mix=nn.Linear(T + 1, T + 1),
            cls=parameter(1, 1, D),
            pos=parameter(1, T + 1, D),
            head=nn.Linear(D, C),
        ),
        one_label,
    ),
    "positions-without-samples": (
        lambda: Wrapped(_positions, wte=nn.Embedding(V, D), wpe=nn.Embedding(T, D), head=nn.Linear(D, C)),
        tokens,
    ),
    "positions-leading-one": (
        lambda: Wrapped(_positions_leading_one, wte=nn.Embedding(V, D), wpe=nn.Embedding(T, D), head=nn.Linear(D, C)),
        tokens,
    ),
    "layer-scale": (
        lambda: Wrapped(
            lambda m, x: m.head(m.first(x).tanh() * m.scale), first=nn.Linear(I, D), scale=parameter(D), head=nn.Linear(D, C)
        ),
        sequences,
    ),
    "channel-scale": (
        lambda: Wrapped(
            lambda m, x: m.head((x.unsqueeze(1) * m.scale).tanh().flatten(1)),
            scale=parameter(D, 1, 1),
            head=nn.Linear(D * T * I, C),
        ),
        one_label,
    ),
    "scalar-scale": (
        lambda: Wrapped(
            lambda m, x: m.head((m.first(x) * m.scale).tanh()), first=nn.Linear(I, D), scale=parameter(), head=nn.Linear(D, C)
        ),
        sequences,
    ),
    "raw-mv": (
        lambda: Wrapped(
            lambda m, x: m.head(torch.stack([torch.mv(m.first(x).tanh(), m.w), x.mv(m.v)], -1)),
            first=nn.Linear(I, D),
            w=parameter(D),
            v=parameter(I),
            head=nn.Linear(2, C),
        ),
        vectors,
    ),
    "raw-matmul": (
        lambda: Wrapped(lambda m, x: torch.tanh(x @ m.w) @ m.v + m.b, w=parameter(I, D), v=parameter(D, C), b=parameter(C)),
        sequences,
    ),
    "functional": (
        lambda: Wrapped(
            lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.v), w=parameter(D, I), b=parameter(D), v=parameter(C, D)
        ),
        vectors,
    ),
    "weight-used-twice": (lambda: Wrapped(_twice, first=nn.Linear(I, D), inner=nn.Linear(D, D), head=nn.Linear(D, C)), sequences),
    "bias-used-twice": (
        lambda: Wrapped(
            lambda m, x: m.head((m.first(x) + m.b).tanh() + m.b), first=nn.Linear(I, D), b=parameter(D), head=nn.Linear(D, C)
        ),
        sequences,
    ),
}

# A branch whose output no gradient reaches counts as visited, with gradient zero.
COVERED["half-used-branch"] = (
    lambda: Wrapped(
        lambda m, x: (
            m.head(m.first(x).tanh()) + 0 * m.idle(x).unbind(-1)[0].unsqueeze(-1).detach() + m.used(x).unbind(-1)[1].unsqueeze(-1)
        ),
        first=nn.Linear(I, D),
        head=nn.Linear(D, C),
        idle=nn.Linear(I, 2).requires_grad_(False),
        used=nn.Linear(I, 2),
    ),
    sequences,
)


class Recurrent(nn.Module):
    """A recurrent layer between ``[N, T, I]`` and ``[N, T, D]``, padded or packed."""

    def __init__(self, kind, packed=False, **options):
        super().__init__()
        self.r, self.packed, self.batch_first = getattr(nn, kind)(I, D, **options), packed, options.get("batch_first", False)

    def forward(self, x):
        """Every step's output."""
        if self.packed:
            lengths = (x[:, :, 0] > 0).sum(1).clamp(1)  # as the data has it
            out, _ = self.r(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            return nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=T)[0]
        out, _ = self.r(x if self.batch_first else x.transpose(0, 1))
        return out if self.batch_first else out.transpose(0, 1)


class Attention(nn.Module):
    """Self-attention, or cross-attention where ``kdim`` says that keys have a width of their own."""

    def __init__(self, batch_first, kdim=None, **options):
        super().__init__()
        self.a = nn.MultiheadAttention(12, 3, batch_first=batch_first, kdim=kdim, vdim=kdim, **options)
        self.q, self.k = nn.Linear(I, 12), None if kdim is None else nn.Linear(I, kdim)

    def forward(self, x):
        """Attend."""
        q = self.q(x)
        k = q if self.k is None else self.k(x.flip(1))
        if self.a.batch_first:
            return self.a(q, k, k, need_weights=False)[0]
        return self.a(*(t.transpose(0, 1) for t in (q, k, k)), need_weights=False)[0].transpose(0, 1)


class Experts(nn.Module):
    """A mixture of experts: weights stacked in one tensor, rows gathered by what they hold."""

    def __init__(self, experts=3):
        super().__init__()
        self.up, self.down = parameter(experts, D, D), parameter(experts, D, D)
        self.gate = nn.Linear(D, experts)

    def forward(self, x):
        """One expert for each position."""
        rows = x.reshape(-1, D)
        p = self.gate(rows).softmax(-1)
        chosen, out = p.argmax(-1), torch.zeros_like(rows)
        for e in range(len(self.up)):
            mine = (chosen == e).nonzero().squeeze(1)
            hidden = F.linear(rows[mine], self.up[e]).tanh()
            out = out.index_add(0, mine, F.linear(hidden, self.down[e]) * p[mine, e].unsqueeze(1))
        return out.view_as(x)


def pictures(n=N):
    """Images [N, 3, 7, 8] and one label per sample."""
    return torch.randn(n, 3, 7, 8), torch.randint(0, C, (n,))


def _norm_with_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()


def _in_place(m, x):
    y = m.first(x).tanh() + 1
    y *= m.s
    y -= m.b
    y[..., 1:].mul_(m.s[1:]).div_(m.t)
    y /= m.t
    return m.head(y)


def _tied(*, bias=False, scale=1.0):
    model = Wrapped(
        lambda m, x: m.head(torch.tanh(m.inner(m.wte(x) * scale))),
        wte=nn.Embedding(V, D, padding_idx=2),
        inner=nn.Linear(D, D),
        head=nn.Linear(D, V, bias=bias),
    )
    model.head.weight = model.wte.weight
    return model


def _cells(m, x):
    h, c = x.new_zeros(len(x), D), x.new_zeros(len(x), D)
    for t in range(T):
        h, c = m.cell(x[:, t], (h, c))
    return m.head(m.gru(h, c.tanh()))


def _twice_convolved(m, x):
    return m.head(m.conv(x).tanh().mean((2, 3)) + m.conv(F.avg_pool2d(x, 2)).tanh().mean((2, 3)))


def _frames(m, x):
    return m.head(m.conv(x.flatten(0, 1)).tanh().mean((2, 3)).view(len(x), 2, -1).mean(1))


def _frames_first(m, x):
    return m.head(m.conv(x.transpose(0, 1).flatten(0, 1)).tanh().mean((2, 3)).view(2, len(x), -1).mean(0))


def _video(n=N):
    return torch.randn(n, 2, 3, 6, 6), torch.randint(0, C, (n,))


def _one_and_three_axes(m, x):
    h = m.one(x)  # [N, 4, T]
    return m.head(m.three(h[:, None, :, :, None].expand(-1, -1, -1, -1, 3)).flatten(1))


COVERED |= {
    "conv-groups-same": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 4, (2, 3), groups=2, padding="same", dilation=(1, 2)),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, C),
        ),
        pictures,
    ),
    "conv-transposed-depthwise-batch-norm": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
            nn.Conv2d(4, 4, 3, groups=4, bias=False),
            nn.PReLU(4),
            _norm_with_statistics(nn.BatchNorm2d(4)),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * 12 * 14, C),
        ),
        pictures,
    ),
    "instance-norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.InstanceNorm2d(4, affine=True),
            nn.PReLU(),
            _norm_with_statistics(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(120, C),
        ),
        pictures,
    ),
    "batch-norm-vectors": (
        lambda: nn.Sequential(nn.Linear(I, D), _norm_with_statistics(nn.BatchNorm1d(D)), nn.Tanh(), nn.Linear(D, C)),
        vectors,
    ),
    "conv-one-and-three-axes": (
        lambda: Wrapped(_one_and_three_axes, one=nn.Conv1d(T, 4, 2), three=nn.Conv3d(1, 2, 2), head=nn.Linear(12, C)),
        one_label,
    ),
    "conv-called-twice": (
        lambda: Wrapped(_twice_convolved, conv=nn.Conv2d(3, 5, 3, padding=1), head=nn.Linear(5, C)),
        pictures,
    ),
    "conv-frames": (lambda: Wrapped(_frames, conv=nn.Conv2d(3, 5, 3), head=nn.Linear(5, C)), _video),
    "conv-frames-first": (lambda: Wrapped(_frames_first, conv=nn.Conv2d(3, 5, 3), head=nn.Linear(5, C)), _video),
    "attention": (lambda: nn.Sequential(Attention(True), nn.Linear(12, C)), sequences),
    "attention-time-first": (lambda: nn.Sequential(Attention(False, add_bias_kv=True), nn.Linear(12, C)), sequences),
    "attention-cross": (lambda: nn.Sequential(Attention(True, kdim=5), nn.Linear(12, C)), sequences),
    "attention-same-width": (lambda: nn.Sequential(Attention(True, kdim=12), nn.Linear(12, C)), sequences),
    "transformer-encoder": (
        lambda: nn.Sequential(
            nn.Linear(I, 12), nn.TransformerEncoderLayer(12, 3, 13, dropout=0.0, batch_first=True), nn.Linear(12, C)
        ),
        sequences,
    ),
    "lstm": (lambda: nn.Sequential(Recurrent("LSTM", num_layers=2, bidirectional=True), nn.Linear(2 * D, C)), sequences),
    "lstm-projected": (lambda: nn.Sequential(Recurrent("LSTM", proj_size=7, batch_first=True), nn.Linear(7, C)), sequences),
    "lstm-packed": (
        lambda: nn.Sequential(Recurrent("LSTM", packed=True, num_layers=2, bidirectional=True), nn.Linear(2 * D, C)),
        sequences,
    ),
    "gru": (lambda: nn.Sequential(Recurrent("GRU", batch_first=True, bias=False), nn.Linear(D, C)), sequences),
    "gru-packed": (lambda: nn.Sequential(Recurrent("GRU", packed=True), nn.Linear(D, C)), sequences),
    "rnn": (lambda: nn.Sequential(Recurrent("RNN", nonlinearity="relu"), nn.Linear(D, C)), sequences),
    "cells": (lambda: Wrapped(_cells, cell=nn.LSTMCell(I, D), gru=nn.GRUCell(D, D), head=nn.Linear(D, C)), one_label),
    "bilinear": (
        lambda: Wrapped(
            lambda m, x: m.head(m.pair(x.tanh(), m.first(x))), first=nn.Linear(I, 5), pair=nn.Bilinear(I, 5, 7), head=nn.Linear(7, C)
        ),
        sequences,
    ),
    "embedding-bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(V, D, padding_idx=2), nn.Tanh(), nn.Linear(D, C)),
        lambda n=N: (torch.randint(0, V, (n, T)), torch.randint(0, C, (n,))),
    ),
    "experts": (lambda: nn.Sequential(nn.Linear(I, D), Experts(), nn.Linear(D, C)), sequences),
    "stacked-matrices": (
        lambda: Wrapped(
            lambda m, x: m.head(torch.bmm(m.first(x).unflatten(-1, (T, 2)).flatten(0, 1).movedim(0, 1), m.w).tanh().movedim(0, 1)
                                .unflatten(0, x.shape[:2]).flatten(2)),
            first=nn.Linear(I, 2 * T), w=parameter(T, 2, 3), head=nn.Linear(3 * T, C),
        ),
        sequences,
    ),
    "tied-embedding-and-head": (_tied, next_tokens),
    "tied-scaled-with-bias": (lambda: _tied(bias=True, scale=3.0), next_tokens),
    "tied-autoencoder": (
        lambda: Wrapped(
            lambda m, x: m.head(F.linear(F.linear(x, m.w).tanh(), m.w.t())), w=parameter(D, I), head=nn.Linear(I, C)
        ),
        sequences,
    ),
    "sliced-position-table": (
        lambda: Wrapped(_sliced_position_table, first=nn.Linear(I, D), pos=parameter(T + 2, D), head=nn.Linear(D, C)),
        sequences,
    ),
    "chunks-of-one-weight": (
        lambda: Wrapped(
            lambda m, x: m.head(sum(F.linear(x, w).tanh() for w in m.w.chunk(3))), w=parameter(3 * D, I), head=nn.Linear(D, C)
        ),
        sequences,
    ),
    "chunks-of-one-scale": (
        lambda: Wrapped(
            lambda m, x: m.head(torch.cat([h * s for h, s in zip(m.first(x).chunk(2, -1), m.s.chunk(2), strict=True)], -1).tanh()),
            first=nn.Linear(I, D), s=parameter(D), head=nn.Linear(D, C),
        ),
        sequences,
    ),
    **{
        f"einsum-{equation}": (
            lambda equation=equation, shape=shape, out=out: Wrapped(
                lambda m, x: m.head(torch.tanh(torch.einsum(equation, m.first(x), m.w)).reshape(len(x), T, out)),
                first=nn.Linear(I, D), w=parameter(*shape), head=nn.Linear(out, C),
            ),
            sequences,
        )
        for equation, shape, out in [
            ("ntd,do->nto", (D, 2), 2), ("ntd,od->nto", (2, D), 2), ("...d,do", (D, 2), 2), ("ntd,dhk->nthk", (D, 2, 3), 6),
            ("ntd,tdo->nto", (T, D, 2), 2), ("ntd,d->ntd", (D,), D), ("...d,...d->...", (D,), 1), ("ntd,td->nt", (T, D), 1),
            ("ntd,ts->nsd", (T, T), D), ("nsd,o->nsod", (2,), 2 * D),
        ]
    },
    "einsum-weight-first": (
        lambda: Wrapped(lambda m, x: m.head(torch.einsum("od,ntd->nto", m.w, x).tanh()), w=parameter(D, I), head=nn.Linear(D, C)),
        sequences,
    ),
    "einsum-of-three": (
        lambda: Wrapped(lambda m, x: m.head(torch.einsum("ntd,de,ef->ntf", x, m.w, m.v).tanh()), w=parameter(I, D), v=parameter(D, 2), head=nn.Linear(2, C)),
        sequences,
    ),
    "einsum-of-heads": (
        lambda: Wrapped(
            lambda m, x: m.head(torch.einsum("nthk,hkj->nthj", m.first(x).unflatten(-1, (3, 4)), m.w).flatten(2).tanh()),
            first=nn.Linear(I, 12), w=parameter(3, 4, 2), head=nn.Linear(6, C),
        ),
        sequences,
    ),
    "einsum-of-a-basis": (
        lambda: Wrapped(lambda m, x: m.head(torch.einsum("ntik,oik->nto", torch.stack([x, x**2], -1), m.w).tanh()), w=parameter(D, I, 2), head=nn.Linear(D, C)),
        sequences,
    ),
    "tensordot": (
        lambda: Wrapped(
            lambda m, x: m.head(torch.tensordot(torch.tensordot(x, m.w, dims=([-1], [1])).tanh(), m.v, 1)),
            w=parameter(D, I), v=parameter(D, 2), head=nn.Linear(2, C),
        ),
        sequences,
    ),
    "inner": (
        lambda: Wrapped(lambda m, x: m.head(torch.inner(x, m.w).tanh()) * torch.inner(x, m.v).unsqueeze(-1), w=parameter(D, I), v=parameter(I), head=nn.Linear(D, C)),
        sequences,
    ),
    "gate-by-a-vector": (
        lambda: Wrapped(lambda m, x: m.head(x) * (x @ m.v).sigmoid().unsqueeze(-1), v=parameter(I), head=nn.Linear(I, C)),
        sequences,
    ),
    "stack-of-matrices": (
        lambda: Wrapped(
            lambda m, x: m.head(((x.unsqueeze(-2).unsqueeze(-2) @ m.w).squeeze(-2) @ m.one).flatten(2).tanh()),
            w=parameter(3, I, 2), one=parameter(1, 2, 2), head=nn.Linear(6, C),
        ),
        sequences,
    ),
    "stack-on-the-left": (
        lambda: Wrapped(
            lambda m, x: m.head((m.w @ m.first(x).unflatten(-1, (3, 4)).unsqueeze(-1)).flatten(2).tanh()),
            first=nn.Linear(I, 12), w=parameter(3, 2, 4), head=nn.Linear(6, C),
        ),
        sequences,
    ),
    "differences": (
        lambda: Wrapped(lambda m, x: m.head(torch.tanh((x - m.b) * torch.rsub(x, m.b) + m.b)) - m.c, b=parameter(I), c=parameter(C), head=nn.Linear(I, C)),
        sequences,
    ),
    "in-place": (
        lambda: Wrapped(_in_place, b=parameter(D), s=parameter(D), t=parameter(1), first=nn.Linear(I, D), head=nn.Linear(D, C)),
        sequences,
    ),
    "quotients": (
        lambda: Wrapped(
            lambda m, x: m.head(x / (x * x + 1) / m.s + m.s / (x * x + 1)) / m.t + x.sum(-1, keepdim=True) * m.t,
            s=parameter(I), t=nn.Parameter(torch.tensor(1.7)), head=nn.Linear(I, C),
        ),
        sequences,
    ),
    "prototypes": (
        lambda: Wrapped(lambda m, x: m.head(torch.exp(-(x.unsqueeze(-2) - m.w).square().sum(-1))), w=parameter(D, I), head=nn.Linear(D, C)),
        sequences,
    ),
    "addcmul": (
        lambda: Wrapped(lambda m, x: m.head(torch.addcmul(m.b, x, m.s, value=0.5)), b=parameter(I), s=parameter(I), head=nn.Linear(I, C)),
        sequences,
    ),
    "selected-rows": (
        lambda: Wrapped(
            lambda m, x: m.head(x + m.w.index_select(0, (x > 0).sum(-1).flatten()).view_as(x)), w=parameter(I + 1, I), head=nn.Linear(I, C)
        ),
        sequences,
    ),
    "columns-of-one-weight": (
        lambda: Wrapped(lambda m, x: m.head(F.linear(x[..., 1:], m.w[:, 1:])), w=parameter(D, I), head=nn.Linear(D, C)),
        sequences,
    ),
    "einsum-across-a-weight": (  # whose numbers a product of matrices needs in another order
        lambda: Wrapped(lambda m, x: m.head(torch.einsum("nti,hik->nthk", x, m.w).flatten(2).tanh()), w=parameter(2, I, 3), head=nn.Linear(6, C)),
        sequences,
    ),
}  # fmt: skip


def _distances():
    return (torch.arange(T) - torch.arange(T)[:, None]) + T


def _scored(m, x):
    scores = m.inner(x) @ x.mT
    scores += m.bias(_distances()).squeeze(-1).unsqueeze(0)
    return m.head(scores.softmax(-1) @ x)


def _attending(m, x):
    bias = m.bias(_distances()).squeeze(-1)[None]
    bias = torch.where(torch.ones(len(x), T, T, dtype=torch.bool).tril(), bias, -1e4)
    return m.head(F.scaled_dot_product_attention(m.inner(x), x, x, attn_mask=bias))


# the same for parameters covered by the chain rule: name -> (builder, data, those parameters)
CHAINED = {
    "windows-that-overlap": (  # a Toeplitz matrix
        lambda: Wrapped(lambda m, x: m.head(torch.tanh(F.linear(x, m.w.unfold(0, I, 1)))), w=parameter(I + 5), head=nn.Linear(6, C)),
        sequences,
        {"w"},
    ),
    "scale-of-a-weight": (
        lambda: Wrapped(lambda m, x: F.linear(x, m.w * m.s), w=parameter(C, I), s=parameter(C, 1)),
        vectors,
        {"w", "s"},
    ),
    "overlapping-parts": (
        lambda: Wrapped(
            lambda m, x: m.head(torch.tanh(F.linear(x, m.w[:4]) + F.linear(x, m.w[2:6]))), w=parameter(7, I), head=nn.Linear(4, C)
        ),
        sequences,
        {"w"},
    ),
    "weight-norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(I, D)), nn.Tanh(), nn.Linear(D, C)),
        sequences,
        {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    ),
    "orthogonal": (
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(I, I)), nn.Tanh(), nn.Linear(I, C)),
        sequences,
        {"0.parametrizations.weight.original"},
    ),
    "relative-bias": (  # a table without a sample axis, whose use cannot be given one
        lambda: Wrapped(
            lambda m, x: m.head(m.first(x) + m.bias(torch.arange(T * D).view(T, D) % V).permute(2, 0, 1)),
            first=nn.Linear(I, D), bias=nn.Embedding(V, 1), head=nn.Linear(D, C),
        ),
        sequences,
        {"bias.weight"},
    ),
    "spectral-norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(I, D)), nn.Tanh(), nn.Linear(D, C)).eval(),
        sequences,
        {"0.parametrizations.weight.original"},
    ),
    "merged-adapter": (  # three parameters in one weight
        lambda: Wrapped(
            lambda m, x: m.head(torch.tanh(F.linear(x, m.w + 0.5 * (m.b @ m.a)))),
            w=parameter(D, I), b=parameter(D, 2), a=parameter(2, I), head=nn.Linear(D, C),
        ),
        sequences,
        {"w", "b", "a"},
    ),
    "weight-of-a-network": (
        lambda: Wrapped(lambda m, x: F.linear(x, m.inner(m.z).tanh().view(C, I)), z=parameter(3), inner=nn.Linear(3, C * I)),
        vectors,
        {"z", "inner.weight", "inner.bias"},
    ),
    "itself-and-a-function": (
        lambda: Wrapped(
            lambda m, x: m.head(torch.tanh(x @ m.w) @ torch.linalg.matrix_exp(0.1 * m.w)), w=parameter(I, I), head=nn.Linear(I, C)
        ),
        sequences,
        {"w"},
    ),
    "scale-without-axes": (
        lambda: Wrapped(lambda m, x: m.head(x) * m.s.exp(), s=nn.Parameter(torch.tensor(0.3)), head=nn.Linear(I, C)),
        vectors,
        {"s"},
    ),
    "decay": (
        lambda: Wrapped(lambda m, x: m.head((x * torch.exp(-m.a)).cumsum(1)), a=parameter(I), head=nn.Linear(I, C)),
        sequences,
        {"a"},
    ),
    "kernel-of-a-convolution": (
        lambda: Wrapped(
            lambda m, x: m.head(F.conv1d(x.mT, F.softplus(m.w) - m.w.mean(), padding=1).mT), w=parameter(D, I, 3), head=nn.Linear(D, C)
        ),
        sequences,
        {"w"},
    ),
    "mask-of-a-weight": (
        lambda: Wrapped(lambda m, x: m.head(F.linear(x, m.w * torch.ones(D, I).tril()).tanh()), w=parameter(D, I), head=nn.Linear(D, C)),
        sequences,
        {"w"},
    ),
    "quotient-of-weights": (
        lambda: Wrapped(
            lambda m, x: m.head(F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True)).tanh()),
            g=parameter(D, 1), v=parameter(D, I), head=nn.Linear(D, C),
        ),
        sequences,
        {"g", "v"},
    ),
    "cayley": (  # made of a weight by four calls of which two are of what the others make
        lambda: Wrapped(
            lambda m, x: m.head(torch.tanh(x @ torch.linalg.solve(torch.eye(I) + m.w - m.w.t(), torch.eye(I) - m.w + m.w.t()))),
            w=parameter(I, I), head=nn.Linear(I, C),
        ),
        sequences,
        {"w"},
    ),
    "lerp": (
        lambda: Wrapped(lambda m, x: m.head(torch.lerp(x, x.tanh(), m.a.sigmoid())), a=parameter(1), head=nn.Linear(I, C)),
        sequences,
        {"a"},
    ),
    "bias-of-scores": (  # added in place to what the samples make
        lambda: Wrapped(_scored, inner=nn.Linear(I, I), bias=nn.Embedding(2 * T, 1), head=nn.Linear(I, C)),
        sequences,
        {"bias.weight"},
    ),
    "bias-of-attention": (
        lambda: Wrapped(_attending, inner=nn.Linear(I, I), bias=nn.Embedding(2 * T, 1), head=nn.Linear(I, C)),
        sequences,
        {"bias.weight"},
    ),
    "checkpointed": (
        lambda: Wrapped(
            lambda m, x: m.head(checkpoint(m.net, x, use_reentrant=False)),
            net=nn.Sequential(nn.Linear(I, D), nn.utils.parametrizations.weight_norm(nn.Linear(D, D)), nn.Tanh()), head=nn.Linear(D, C),
        ),
        sequences,
        {"net.1.parametrizations.weight.original0", "net.1.parametrizations.weight.original1"},
    ),
}  # fmt: skip

# and for those that no rule covers where the samples come in
FALLBACK = {
    "logaddexp": (
        lambda: Wrapped(lambda m, x: m.head(torch.logaddexp(m.first(x), m.w)), first=nn.Linear(I, D), w=parameter(D), head=nn.Linear(D, C)),
        sequences,
        {"w"},
    ),
    "exponent": (
        lambda: Wrapped(lambda m, x: m.head(m.first(x).abs().add(0.1).pow(m.p)), first=nn.Linear(I, D), p=parameter(D), head=nn.Linear(D, C)),
        sequences,
        {"p"},
    ),
    "spectrum": (  # whose numbers are complex, and gradients of real ones are not those of a rule
        lambda: Wrapped(
            lambda m, x: m.head(torch.fft.irfft(torch.fft.rfft(m.first(x), dim=1) * torch.fft.rfft(m.k, n=T, dim=0), n=T, dim=1)),
            first=nn.Linear(I, D), k=parameter(3, D), head=nn.Linear(D, C),
        ),
        sequences,
        {"k"},
    ),
    "complex": (
        lambda: Wrapped(lambda m, x: m.head((torch.complex(m.first(x), m.first(x).tanh()) * m.s + m.b).abs()), first=nn.Linear(I, D), s=parameter(D), b=parameter(D), head=nn.Linear(D, C)),
        sequences,
        {"s", "b"},
    ),
    "inside-vmap": (
        lambda: Wrapped(lambda m, x: m.head(torch.vmap(lambda row: (row * m.w).sin() + m.b.cumsum(0))(x)), w=parameter(I), b=parameter(I), head=nn.Linear(I, C)),
        vectors,
        {"w", "b"},
    ),
    "logaddexp-then-scale": (  # what no rule covers holds samples, and goes on as samples do
        lambda: Wrapped(
            lambda m, x: m.head(torch.relu(torch.logaddexp(m.first(x), m.w) - 1) * m.s),
            first=nn.Linear(I, D), w=parameter(D), s=parameter(D), head=nn.Linear(D, C),
        ),
        vectors,
        {"w"},
    ),
}  # fmt: skip

EVERY = {**COVERED, **CHAINED, **FALLBACK}


def doubles(name, n=N):
    """One of them in float64, inputs and labels."""
    build, data, *_ = EVERY[name]
    model, (x, y) = build().double(), data(n)
    return model, x.double() if x.is_floating_point() else x, y


def mlp():
    """Three layers in float64, the last without a bias."""
    return nn.Sequential(nn.Linear(I, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, C, bias=False)).double()


STRUCTURES = ["diagonal", "kfac", "ekfac", "gram"]


def measure(model, data, structure, fisher_type="empirical", **options):
    """Their Fisher: ``ff.fisher`` without a progress bar, of the labels that the data have."""
    return ff.fisher(model, data, structure, fisher_type, progress=False, **options)
