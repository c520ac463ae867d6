"""The MCSD block: a slope section and a decay section over one kind of recurrence, fused.

Source: "MCSD: An Efficient Language Model with Diverse Fusion" (arXiv 2406.12230v1), section 2.2;
equation numbers are the paper's.

    U, V        current token and history of the slope section     (B, N, C, Dc)
    F, E        current token and history of the decay section     (B, N, C, Dc)
    beta        slopes, beta_i = 2^(-8 (i+1) / C)                  (C,)           Eq. 2
    alpha       decays, alpha_i = 1 - 2^(-5-i)                     (C,)           Eq. 8
    A           sum_{j>=1} e^(-j beta) V_{n-j}, the slope state    (B, C, Dc)
    H           sum_{j>=1} alpha^j E_{n-j}, the decay state        (B, C, Dc)
    n           tokens seen before this one                        (B, N)
    Z           sum_{j<n} e^(-j beta), the slope's weights         (B, N, C)
    theta       the fused sections                                 (B, N, D) or (B, N, 2D)

Where the paper prints the normalised slope state S (Eq. 16), this keeps the sum A = e^(-beta) Z S,
so that both sections run ``h <- lambda (h + x)`` and Z is divided out on reading.
"""

import math
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from .. import kernels, sharding
from ..config import ModelArgs
from ..linear import Linear
from ..pieces import in_pieces
from ..recurrence import count_tokens, scan
from .base import Mixer, State, register


@cache
def slopes(C: int) -> tuple[float, ...]:
    """Return beta_i = 2^(-8 (i+1) / C), i = 0..C-1, in float64 (Eq. 2)."""
    return tuple(2.0 ** (-8 * (i + 1) / C) for i in range(C))


@cache
def decays(C: int) -> tuple[float, ...]:
    """Return alpha_i = 1 - 2^(-5-i), i = 0..C-1, in float64 (Eq. 8)."""
    return tuple(1.0 - 2.0 ** (-5 - i) for i in range(C))


def slope(U: mx.array, V: mx.array, A: mx.array, n: mx.array, beta: mx.array) -> mx.array:
    """Slope section (Eqs. 3, 5, 6): ``U_n SiLU(V'_n)``, ``V'_n = A_n / (e^-beta Z_n)``, V'_1 = V_1.

    The divisor is ``e^-beta Z_n = expm1(-n beta) / -expm1(beta)``; the printed quotient of
    1 - e^(-n beta) and 1 - e^(-beta) loses three digits in float32.

    Args:
        U: (B, N, C, Dc).
        V: (B, N, C, Dc).
        A: (B, N, C, Dc) float32, the recurrence of V with lambda = e^-beta.
        n: (B, N, 1, 1) int32.
        beta: (C, 1) float32.

    Returns:
        (B, N, C, Dc) float32.
    """
    # n = 0 divides by Z_1: the quotient is not used there, but 0 / 0 would poison its gradient.
    # Once per channel: with the last axis left out, mx.compile does not fuse it into every feature.
    n_beta = mx.maximum(n.squeeze(-1), 1) * beta[:, 0]  # (B, N, C)
    divisor = mx.expand_dims(mx.expm1(-n_beta) / -mx.expm1(beta[:, 0]), -1)  # (B, N, C, 1)
    V_past = mx.where(n.astype(mx.bool_), A / divisor, V.astype(mx.float32))
    return U.astype(mx.float32) * (V_past * mx.sigmoid(V_past))


def decay(
    F: mx.array, E: mx.array, H: mx.array, n: mx.array, gain: mx.array, eps: float
) -> mx.array:
    """Decay section (Eqs. 9, 12, 20): ``sigmoid(F_n) RMSNorm(E'_n)``, ``E'_n = H_n``, E'_1 = E_1.

    Args:
        F: (B, N, C, Dc).
        E: (B, N, C, Dc).
        H: (B, N, C, Dc) float32, the recurrence of E with lambda = alpha.
        n: (B, N, 1, 1) int32.
        gain: (D,), the norm's; the norm runs over the Dc features of each channel.
        eps: the norm's.

    Returns:
        (B, N, C, Dc) float32.
    """
    E_past = mx.where(n.astype(mx.bool_), H, E.astype(mx.float32))
    normed = mx.fast.rms_norm(E_past, None, eps) * gain.reshape(F.shape[2:])  # (C, Dc)
    return mx.sigmoid(F.astype(mx.float32)) * normed


class Slot(NamedTuple):
    """One section of a block: its kind, and the names of its projections and of its norm."""

    section: str
    current: str
    history: str
    norm: str


def _slots(sections: list[str]) -> tuple[Slot, ...]:
    """Slot 0 owns u and v, slot 1 owns f and e; a lone decay takes slot 1's."""
    if sections == ["decay"]:
        return (Slot("decay", "f", "e", "decay_norm"),)
    first_norm = "decay_norm_0" if sections == ["decay", "decay"] else "decay_norm"
    slots = (Slot(sections[0], "u", "v", first_norm), Slot(sections[-1], "f", "e", "decay_norm"))
    return slots[: len(sections)]


@register("mcsd")
class MCSD(Mixer):
    """The MCSD block (Eqs. 1-21), with the sections, fusion and projections the arguments name.

    State: one (B, C, Dc) float32 array per section, then the count n, (B,) int32. Its size does not
    depend on how many tokens were read.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, C = args.hidden_size, args.num_channels
        self.Dc = D // C
        self.sharding_group = None
        self._hold(C, 0, C)
        self.channelwise = args.projection == "channel"
        self.concat = args.fusion == "concat"
        self._slots = _slots(args.sections)
        self._has_kernels = args.sections == ["slope", "decay"]

        # One matrix holds every projection, its rows in the order U, V, E, F.
        used = {name for slot in self._slots for name in (slot.current, slot.history)}
        self.projections = "".join(name for name in "uvef" if name in used)
        k = len(self.projections)
        self[f"{self.projections}_proj"] = (
            SwitchLinear(self.Dc, k * self.Dc, C, bias=False)
            if self.channelwise
            else Linear(D, k * D)
        )
        for slot in self._slots:
            if slot.section == "decay":
                self[slot.norm] = nn.RMSNorm(D, args.rms_norm_eps)
        self.theta_width = len(self._slots) * self.Dc if self.concat else self.Dc  # of a channel
        if args.output_projection:
            self.o_proj = Linear(C * self.theta_width, D)

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """See :class:`Mixer`."""
        return {f"{self.projections}_proj": tuple(f"{p}_proj" for p in self.projections)}

    def _hold(self, C: int, start: int, stop: int) -> None:
        """Set what depends on which of the C channels are held here: start to stop."""
        self.C = stop - start
        self._slopes, self._decays = slopes(C)[start:stop], decays(C)[start:stop]
        self._lam = {"slope": tuple(math.exp(-b) for b in self._slopes), "decay": self._decays}
        self._beta = mx.array(self._slopes)[:, None]  # (C, 1)

    def shard(self, group: mx.distributed.Group) -> None:
        """See :class:`Mixer`; whole channels, at most one more on some ranks than on others."""
        C, Dc = self.C, self.Dc
        D, k = C * Dc, len(self.projections)
        unit = 1
        if "o_proj" in self:  # its inputs, Dc or a multiple of it a channel, may be quantized
            width = self.theta_width
            unit = math.lcm(width, sharding.group_size(self.o_proj)) // width
        spans = sharding.shares("num_channels", C, group.size(), unit)
        start, stop = spans[group.rank()]
        features = start * Dc, stop * Dc

        proj = self[f"{self.projections}_proj"]
        if self.channelwise:
            sharding.take(proj, 0, C, (start, stop))
        else:
            rows = [(i * D + features[0], i * D + features[1]) for i in range(k)]
            sharding.take(proj, -2, k * D, *rows)
        for slot in self._slots:
            if slot.section == "decay":
                self[slot.norm].weight = mx.contiguous(self[slot.norm].weight[slice(*features)])
        if "o_proj" in self:
            sharding.take(self.o_proj, -1, C * width, (start * width, stop * width))
        self._hold(C, start, stop)
        self._features = features
        self._widths = tuple((b - a) * Dc for a, b in spans)
        self.sharding_group = group

    def init_state(self, batch: int) -> State:
        """Return zeros: one (B, C, Dc) float32 array per section and the count, (B,) int32."""
        shape = (batch, self.C, self.Dc)
        return [mx.zeros(shape, mx.float32) for _ in self._slots] + [mx.zeros(batch, mx.int32)]

    def state_bytes(self, tokens: int) -> int:
        """Return the bytes of one sequence's state: the same for any number of tokens."""
        return 4 * (len(self._slots) * self.C * self.Dc + 1)

    def __call__(
        self,
        x: mx.array,
        state: State | None = None,
        mask: mx.array | None = None,
        reset: mx.array | None = None,
    ) -> tuple[mx.array, State]:
        """Mix (Eqs. 13, 20, 21); see :class:`Mixer`.

        The recurrences, the gates and the norm run in float32; only theta is narrowed to x's dtype.
        """
        B, N, _ = x.shape
        *past, count = self.init_state(B) if state is None else state
        if self.sharding_group is not None:
            x = sharding.sum_gradients(self.sharding_group)(x)
        projected = self._project(x)
        if self._has_kernels and kernels.available(x.dtype):
            theta, state = self._by_kernels(projected, past, count, mask, reset)
            return self._output(theta.astype(x.dtype)), state
        n, count = count_tokens(count, N, mask, reset)
        n = n[..., None, None]  # (B, N, 1, 1)

        outputs = []
        for i, slot in enumerate(self._slots):
            current, history = projected[slot.current], projected[slot.history]
            h, past[i] = scan(history, self._lam[slot.section], past[i], mask, reset)
            if slot.section == "slope":
                outputs.append(slope(current, history, h, n, self._beta))
            else:
                norm = self[slot.norm]
                outputs.append(decay(current, history, h, n, norm.weight, norm.eps))

        # theta (B, N, C, Dc), or (B, N, C, 2 Dc) with each channel's sections side by side
        theta = mx.concatenate(outputs, axis=-1) if self.concat else sum(outputs[1:], outputs[0])
        return self._output(theta.reshape(B, N, -1).astype(x.dtype)), [*past, count]

    def _by_kernels(self, projected, past, count, mask, reset) -> tuple[mx.array, State]:
        """Return theta (B, N, D or 2D) and the new state of a slope and a decay section."""
        tokens = [projected[p] for p in "uvef"]
        gain = self.decay_norm.weight
        options = dict(beta=self._slopes, eps=self.decay_norm.eps, concat=self.concat)
        N = tokens[0].shape[1]
        if N == 1 and not self.training:  # the step has no gradient
            theta, *state = kernels.mcsd_step(
                *tokens, *past, count, gain, alpha=self._decays, mask=mask, reset=reset, **options
            )
            return theta, state
        n, count = count_tokens(count, N, mask, reset)

        def run(past, U, V, E, F, n, mask, reset):
            A, A_last = scan(V, self._lam["slope"], past[0], mask, reset)
            H, H_last = scan(E, self._lam["decay"], past[1], mask, reset)
            return kernels.mcsd_mix(U, V, E, F, A, H, n, gain, **options), [A_last, H_last]

        theta, past = in_pieces(run, past, *tokens, n, mask, reset)
        return theta, [*past, count]

    def _output(self, theta: mx.array) -> mx.array:
        """Return y (B, N, D) of the theta of the channels held here."""
        group = self.sharding_group
        if "o_proj" in self:
            y = self.o_proj(theta)
            return y if group is None else mx.distributed.all_sum(y, group=group)
        return theta if group is None else sharding.gather(theta, self._widths, group)

    def _project(self, x: mx.array) -> dict[str, mx.array]:
        """Return U, V, E, F (Eqs. 1, 7), each (B, N, C, Dc), by their lower-case names."""
        B, N, _ = x.shape
        C, Dc, k = self.C, self.Dc, len(self.projections)
        proj = self[f"{self.projections}_proj"]
        if self.channelwise:
            if self.sharding_group is not None:
                x = x[..., slice(*self._features)]
            if mx.default_device() == mx.cpu:
                x = x.astype(mx.float32)  # the only dtype of gathered products on the CPU
            x = x.reshape(B * N, C, Dc).swapaxes(0, 1)  # (C, B*N, Dc)
            y = proj(x, mx.arange(C))  # (C, B*N, k*Dc)
            y = y.reshape(C, B, N, k * Dc).transpose(1, 2, 0, 3)  # (B, N, C, k*Dc)
            parts = mx.split(y, k, axis=-1)
        elif N == 1:
            parts = mx.split(proj(x).reshape(B, k, C, Dc), k, axis=1)  # two operations, not five
        else:
            y = proj(x)  # (B, N, k*D)
            parts = [p.reshape(B, N, C, Dc) for p in mx.split(y, k, axis=-1)]
        return dict(zip(self.projections, parts, strict=True))
