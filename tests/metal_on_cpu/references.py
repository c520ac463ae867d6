"""What the kernels compute, in float64: a token at a time, and gradients by autodiff in PyTorch."""

import numpy as np
import torch

from mlx_mcsd.mixers.mcsd import decays, slopes
from test_recurrence import loop

__all__ = ["adjoint", "block", "loop", "mix", "mix_grad"]

EPS = 1e-6


def adjoint(dh, lam, dlast, mask=None, reset=None):
    """Return dx and dh0 of the recurrence, a token at a time from the last."""
    lam = np.array(lam)[:, None]
    g, dx = dlast.astype(np.float64), np.zeros(dh.shape)
    for n in reversed(range(dh.shape[1])):
        m = np.ones((dh.shape[0], 1, 1), bool) if mask is None else mask[:, n, None, None]
        r = np.zeros_like(m) if reset is None else m & reset[:, n, None, None]
        dx[:, n] = np.where(m, lam * g, 0)
        g = np.where(r, 0, np.where(m, lam * g, g) + dh[:, n])
    return dx, g


def block(tokens, states, count, gain, concat=False, mask=None, reset=None, eps=EPS):
    """Return theta, A, H and count of one token, Eqs. 3-20; tokens are (B, 1, C, Dc)."""
    U, V, E, F = (t[:, 0].astype(np.float64) for t in tokens)  # (B, C, Dc)
    B, C, Dc = U.shape
    m = np.ones((B, 1), bool) if mask is None else mask
    r = m & reset if reset is not None else ~m & m
    A, H = (np.where(r[..., None], 0, s.astype(np.float64)) for s in states)
    n = np.where(r[:, 0], 0, count)
    beta, alpha = np.array(slopes(C))[:, None], np.array(decays(C))[:, None]
    Z = np.expm1(-np.maximum(n, 1)[:, None, None] * beta) / np.expm1(-beta)
    first = (n == 0)[:, None, None]
    V_past, E_past = np.where(first, V, A / (np.exp(-beta) * Z)), np.where(first, E, H)
    with np.errstate(over="ignore"):
        slope = U * V_past / (1 + np.exp(-V_past))
        norm = np.sqrt((E_past**2).mean(axis=-1, keepdims=True) + eps)
        decay = E_past / norm * gain.reshape(C, Dc) / (1 + np.exp(-F))
    theta = np.concatenate([slope, decay], axis=-1) if concat else slope + decay
    exists = m[..., None]
    A, H = np.where(exists, np.exp(-beta) * (A + V), A), np.where(exists, alpha * (H + E), H)
    return theta.reshape(B, 1, -1), A, H, n + m[:, 0]


def mix(U, V, E, F, A, H, n, gain, concat=False, eps=EPS):
    """Return theta of a whole sequence: every token is a row of `block`."""
    B, N, C, Dc = U.shape
    tokens = [a.reshape(B * N, 1, C, Dc) for a in (U, V, E, F)]
    states = [a.reshape(B * N, C, Dc) for a in (A, H)]
    return block(tokens, states, n.reshape(-1), gain, concat, eps=eps)[0].reshape(B, N, -1)


def mix_grad(dtheta, U, V, E, F, A, H, n, gain, concat=False, eps=EPS):
    """Return what `mix` passes back to U, V, E, F, A, H and gain."""
    C, Dc = U.shape[2:]
    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (U, V, E, F, A, H)]
    gain = torch.tensor(gain, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(slopes(C), dtype=torch.float64)[:, None]
    U, V, E, F, A, H = leaves
    n = torch.tensor(n)[..., None, None]
    first = n == 0
    Z = torch.expm1(-n.clamp(min=1) * beta) / torch.expm1(-beta)
    V_past = torch.where(first, V, A / (torch.exp(-beta) * Z))
    E_past = torch.where(first, E, H)
    rms = torch.sqrt((E_past**2).mean(dim=-1, keepdim=True) + eps)
    parts = [
        U * torch.nn.functional.silu(V_past),
        torch.sigmoid(F) * E_past / rms * gain.reshape(C, Dc),
    ]
    theta = torch.cat(parts, dim=-1) if concat else sum(parts)
    cotangent = torch.tensor(dtheta, dtype=torch.float64).reshape(theta.shape)
    return [g.numpy() for g in torch.autograd.grad(theta, [*leaves, gain], cotangent)]
