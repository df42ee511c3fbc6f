# SPDX-License-Identifier: Apache-2.0
"""Small networks, one for each way a parameter can be used, and data for them. Sizes are primes: no axis passes for another."""

import torch
import torch.nn.functional as F
from torch import nn

N, T, I, D, C, V = 7, 5, 3, 11, 4, 13


def vectors(n=N):
    """Inputs [N, I] and one label per sample."""
    return torch.randn(n, I), torch.randint(0, C, (n,))


def sequences(n=N):
    """Inputs [N, T, I] and one label per position."""
    return torch.randn(n, T, I), torch.randint(0, C, (n, T))


def tokens(n=N):
    """Token ids [N, T] and one label per position."""
    return torch.randint(0, V, (n, T)), torch.randint(0, C, (n, T))


def images(n=N):
    """Images [N, 1, 6, 6] and one label per sample."""
    return torch.randn(n, 1, 6, 6), torch.randint(0, C, (n,))


class Wrapped(nn.Module):
    """A module from parts and a forward function ``f(self, x)``."""

    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        """Call f."""
        return self.f(self, x)


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
        lambda n=N: (torch.randn(n, T, I), torch.randint(0, C, (n,))),
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
        lambda n=N: (torch.randn(n, T, I), torch.randint(0, C, (n,))),
    ),
    "scalar-scale": (
        lambda: Wrapped(
            lambda m, x: m.head((m.first(x) * m.scale).tanh()), first=nn.Linear(I, D), scale=parameter(), head=nn.Linear(D, C)
        ),
        sequences,
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

# the same for parameters that must go to the loop over samples: name -> (builder, data, looped parameters)
LOOPED = {
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, C)),
        images,
        {"0.weight", "0.bias"},
    ),
    "tied-embedding-and-head": (
        lambda: Wrapped(
            lambda m, x: F.linear(torch.tanh(m.inner(m.wte(x))), m.wte.weight), wte=nn.Embedding(V, D), inner=nn.Linear(D, D)
        ),
        lambda n=N: (torch.randint(0, V, (n, T)), torch.randint(0, V, (n, T))),
        {"wte.weight"},
    ),
    "sliced-position-table": (
        lambda: Wrapped(_sliced_position_table, first=nn.Linear(I, D), pos=parameter(T + 2, D), head=nn.Linear(D, C)),
        sequences,
        {"pos"},
    ),
    "scale-of-a-weight": (
        lambda: Wrapped(lambda m, x: F.linear(x, m.w * m.s), w=parameter(C, I), s=parameter(C, 1)),
        vectors,
        {"w", "s"},
    ),
}
