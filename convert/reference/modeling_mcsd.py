"""PyTorch reference of MCSD (arXiv 2406.12230) for Hugging Face transformers.

Glossary: B batch, N tokens, D hidden size, C channels, Dc = D / C, L layers, F MLP width,
K vocabulary. U, V are the slope section's projections, E, F_ the decay section's; beta and alpha
are their decays; a *slot* is one section of the block with its own history and state.

The paper's quadratic form costs N x N; here the same sums run in chunks of ``CHUNK`` tokens, which
is linear in N and exact. Where the paper is silent the choices are: histories are strictly past;
the first token of a document sees itself (V'_1 = V_1, E'_1 = E_1) while the state starts at zero;
the decay norm acts on the state (Eq. 20), not on the decay matrix (Eq. 9).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .configuration_mcsd import MCSDConfig

CHUNK = 64

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def wide(x):
    """At least float32: what sums over history and norms are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def tokens_seen(count, tokens, mask=None, reset=None):
    """How many tokens of its document precede each position: (B, N), and the count after, (B,)."""
    if mask is None:
        mask = torch.ones(1, tokens, dtype=torch.bool, device=count.device)
    before = count[:, None] + mask.long().cumsum(1) - mask.long()
    if reset is not None:
        origin = torch.where(reset & mask, before, 0).cummax(1).values
        before = before - origin
    return before, before[:, -1] + mask[:, -1].long()


class MCSDTimeline:
    """Where each of N tokens stands in its document, as weights of the sums over history.

    One serves every layer. The N tokens are M chunks of T; with p the number of real tokens of its
    chunk before a position, h the state before the chunk and m the mask, position i reads
    (lambda^(p_i) h + sum_{j<i} m_j lambda^(p_i - p_j) x_j) / Z_i (Eqs. 3, 5, 11), where Z_i = 1 in
    a decay section, and a first token reads itself. Sums stop where a document starts.

    Args:
        sections: names of the sections, in any order.
        channels: C.
        tokens: N.
        count: (B,) int64 tokens seen before, or None at a start.
        mask: (B, N) bool, False where a step must leave the state alone.
        reset: (B, N) bool, True where a token starts a new document, on a zero state.
        dtype: of the weights, float32 or float64.
        device: of the weights, that of ``count``, ``mask`` and ``reset``.
    """

    def __init__(self, sections, channels, tokens, count, mask, reset, dtype, device):
        chunks = -(-tokens // CHUNK)  # M
        length = -(-tokens // chunks)  # T
        if count is None:
            count = torch.zeros(1, dtype=torch.long, device=device)
        seen, self.count = tokens_seen(count, tokens, mask, reset)

        def split(x):  # (B, N) -> (B, M, T), padded by what counts for nothing
            return F.pad(x, (0, chunks * length - tokens)).unflatten(1, (chunks, length))

        # Without mask and reset every row has the same weights: B = 1 in these shapes.
        real = split(torch.ones_like(seen[:1], dtype=torch.bool) if mask is None else mask)
        starts = torch.zeros_like(real) if reset is None else split(reset) & real
        document = starts.long().cumsum(-1)  # (B, M, T)
        clock = F.pad(real.long().cumsum(-1), (1, 0))  # (B, M, T + 1): real tokens so far
        # Rows 0 .. T - 1 are what the positions read, row T is what the chunk leaves behind.
        reader = torch.cat([document, document[..., -1:]], -1)  # (B, M, T + 1)
        age = (clock[..., :, None] - clock[..., None, :-1]).clamp(min=0)  # (B, M, T + 1, T)
        past = torch.ones(length + 1, length, dtype=torch.bool, device=device).tril(-1)
        itself = torch.eye(length + 1, length, dtype=torch.bool, device=device)
        n = split(seen)  # (B, M, T)
        first = F.pad(n == 0, (0, 1))  # (B, M, T + 1)
        same = reader[..., :, None] == document[..., None, :]
        counts = past & real[..., None, :] & same | itself & first[..., None]  # (B, M, T + 1, T)
        channel = torch.arange(channels, device=device)[:, None]  # (C, 1)
        self.weights = {}
        for section in dict.fromkeys(sections):
            rate = log_decays(section, channels)[:, None]  # (C, 1)
            powers = torch.exp(rate * torch.arange(length + 1, device="cpu")).to(dtype).to(device)
            rate = rate.to(dtype).to(device)
            weights = powers[channel[..., None], age[:, :, None]] * counts[:, :, None]
            left = powers[channel, clock[:, :, None]] * (reader == 0)[:, :, None]
            if section == "slope":
                # Z_n = sum_{j=1}^{n} e^(-j beta), the weight of n past tokens (Eq. 5).
                count = n[:, :, None].to(dtype)  # (B, M, 1, T)
                Z = torch.exp(rate) * torch.expm1(count * rate) / torch.expm1(rate)
                share = 1 / Z.masked_fill(count == 0, 1.0)  # (B, M, C, T)
                share = F.pad(share, (0, 1), value=1.0)  # (B, M, C, T + 1)
                weights, left = weights * share[..., None], left * share
            # (B, M, C, T + 1, T) and (B, M, C, T + 1, 1)
            self.weights[section] = weights, left[..., None]

    def read(self, section, x, h):
        """What each token reads of its past, V' or E', and the state after the last.

        Args:
            section: ``"slope"`` or ``"decay"``.
            x: (B, N, C, Dc) of the timeline's dtype.
            h: (B, C, Dc) of the same, the state before the first token.

        Returns:
            (B, N, C, Dc) and (B, C, Dc).
        """
        weights, left = self.weights[section]
        if not x.dtype == h.dtype == weights.dtype:
            raise TypeError(f"sums over history need {weights.dtype} but got {x.dtype}, {h.dtype}.")
        N = x.shape[1]
        rows, chunks, _, _, length = weights.shape
        if chunks * length > N:
            x = F.pad(x, (0, 0, 0, 0, 0, chunks * length - N))
        x = x.unflatten(1, (chunks, length))  # (B, M, T, C, Dc)
        if rows == 1:
            sums = torch.einsum("mcij,bmjcd->bmcid", weights[0], x)  # (B, M, C, T + 1, Dc)
        else:
            sums = weights @ x.transpose(2, 3)
        sums, added = sums.split([length, 1], 3)
        left, kept = left.split([length, 1], 3)
        before = []
        for m in range(chunks):
            before.append(h)
            h = kept[:, m, :, 0] * h + added[:, m, :, 0]
        reads = torch.addcmul(sums, left, torch.stack(before, 1)[:, :, :, None])
        return reads.transpose(2, 3).flatten(1, 2)[:, :N], h


def log_decays(section, channels):
    """Logarithms of lambda: -beta (Eq. 2) or log alpha (Eq. 8); (C,) float64.

    In float64, since the slowest alpha is close to 1, and so on the CPU: not every device has it.
    """
    i = torch.arange(channels, dtype=torch.float64, device="cpu")
    if section == "slope":
        return -(2.0 ** (-8.0 * (i + 1) / channels))
    return torch.log1p(-(2.0 ** (-5.0 - i)))


class MCSDRMSNorm(nn.Module):
    """RMSNorm with a learned gain, computed in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Normalise the last axis; the result has x's dtype."""
        y = wide(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * wide(self.weight)).to(x.dtype)


class MCSDChannelNorm(nn.Module):
    """RMSNorm of each channel's Dc features, one gain per feature (D,), in float32 (Eq. 20)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        """Normalise x (B, N, C, Dc) float32 over Dc."""
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return y * wide(self.weight).view(x.shape[-2:])


class MCSDChannelLinear(nn.Module):
    """One Dc x Dc matrix per channel (Eqs. 1 and 7); weight (C, Dc out, Dc in)."""

    def __init__(self, channels, features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, features, features))

    def forward(self, x):
        """(B, N, D) -> (B, N, D), channel by channel."""
        grouped = x.unflatten(-1, self.weight.shape[:2])  # (B, N, C, Dc)
        return torch.einsum("bnci,coi->bnco", grouped, self.weight).flatten(-2)


class MCSDMixer(nn.Module):
    """The MCSD block: slots of slope and decay sections, fused (paper section 2.2)."""

    def __init__(self, config):
        super().__init__()
        D, C = config.hidden_size, config.num_channels
        self.channels, self.features = C, D // C
        self.sections, self.fusion = config.sections, config.fusion

        def projection():
            if config.projection == "dense":
                return nn.Linear(D, D, bias=False)
            return MCSDChannelLinear(C, D // C)

        if config.sections != ["decay"]:
            self.u_proj, self.v_proj = projection(), projection()
        if config.sections != ["slope"]:
            self.e_proj, self.f_proj = projection(), projection()
        for slot, section in enumerate(config.sections):
            if section == "decay":
                self.add_module(self.norm_name(slot), MCSDChannelNorm(config))
        if config.output_projection:
            width = D * (len(config.sections) if config.fusion == "concat" else 1)
            self.o_proj = nn.Linear(width, D, bias=False)

    def norm_name(self, slot):
        """Slot 0 of a double decay has the norm of its own name."""
        return "decay_norm_0" if slot == 0 and self.sections == ["decay", "decay"] else "decay_norm"

    def projections(self, slot):
        """(current, history) of a slot; a lone decay section uses f and e."""
        if slot == 1 or self.sections == ["decay"]:
            return self.f_proj, self.e_proj
        return self.u_proj, self.v_proj

    def timeline(self, x, state=None, mask=None, reset=None):
        """The :class:`MCSDTimeline` of (B, N, D), the same for every layer of a model."""
        count = None if state is None else state[1]
        where = x.shape[1], count, mask, reset, wide(x[:0]).dtype, x.device
        with torch.no_grad():
            return MCSDTimeline(self.sections, self.channels, *where)

    def forward(self, x, state=None, timeline=None):
        """Mix x (B, N, D) over time.

        Args:
            x: (B, N, D).
            state: ((B, slots * C, Dc) float32, (B,) int64 count), or None at a start.
            timeline: of these tokens; None where they are one document without padding.

        Returns:
            (B, N, D) in x's dtype and the new state.
        """
        B, N, _ = x.shape
        C, Dc, slots = self.channels, self.features, len(self.sections)
        if timeline is None:
            timeline = self.timeline(x, state)
        start = wide(x.new_zeros(B, slots * C, Dc)) if state is None else state[0]
        thetas, states = [], list(start.chunk(slots, 1))
        for slot, section in enumerate(self.sections):
            current, history = self.projections(slot)
            current = wide(current(x)).view(B, N, C, Dc)
            history = wide(history(x)).view(B, N, C, Dc)
            with torch.autocast(x.device.type, enabled=False):  # which would sum in bfloat16
                value, states[slot] = timeline.read(section, history, states[slot])
            if section == "slope":
                thetas.append(current * F.silu(value))  # Eq. 6
            else:
                norm = getattr(self, self.norm_name(slot))
                thetas.append(torch.sigmoid(current) * norm(value))  # Eq. 20
        if self.fusion == "concat":
            theta = torch.cat(thetas, -1).flatten(2)  # Eq. 13, (B, N, slots * D)
        else:
            theta = sum(thetas[1:], thetas[0]).flatten(2)  # Eq. 21, (B, N, D)
        theta = theta.to(x.dtype)
        if hasattr(self, "o_proj"):
            theta = self.o_proj(theta)
        return theta, (torch.cat(states, 1), timeline.count.expand(B))


class MCSDMLP(nn.Module):
    """GeGLU: down(act(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        """(B, N, D) -> (B, N, D)."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MCSDLayer(GradientCheckpointingLayer):
    """x + MCSD(RMSNorm(x)), then x + GeGLU(RMSNorm(x)) (Fig. 1)."""

    def __init__(self, config):
        super().__init__()
        self.mixer_norm = MCSDRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MCSDMixer(config)
        self.mlp_norm = MCSDRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MCSDMLP(config)

    def forward(self, x, state=None, timeline=None):
        """(B, N, D) -> (B, N, D) and the mixer's new state."""
        y, state = self.mixer(self.mixer_norm(x), state, timeline)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class MCSDState:
    """What the model remembers: per layer (histories, count); its size never grows.

    ``seen`` counts the positions read so far, padding included: ``generate`` goes on from there.
    """

    is_compileable = False

    def __init__(self, layers, seen=0):
        self.layers, self.seen = layers, seen

    def get_seq_length(self, layer_idx=0):
        """Positions read so far."""
        return self.seen

    def _map(self, function):
        self.layers = [tuple(function(part) for part in layer) for layer in self.layers]

    def reorder_cache(self, beam_idx):
        """Pick rows in place, as beam search asks for."""
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        """Repeat every row in place."""
        self._map(lambda part: part.repeat_interleave(repeats, 0))


@dataclass
class MCSDModelOutput(ModelOutput):
    """Backbone output: hidden states (B, N, D) and the state after the last token."""

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: MCSDState | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MCSDCausalLMOutput(ModelOutput):
    """Language model output: loss, logits (B, N, K) and the state after the last token."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: MCSDState | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class MCSDPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, as transformers expects them."""

    config_class = MCSDConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MCSDLayer",)
    # A past token cannot be taken back out of the state.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding, MCSDChannelLinear)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, MCSDRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MCSDChannelNorm):
            # A normalised average of the past at full size would drown the embeddings at first.
            nn.init.constant_(module.weight, self.config.initializer_range)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False


class MCSDModel(MCSDPreTrainedModel):
    """Embedding, L layers, final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MCSDLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = MCSDRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        position_ids=None,
        reset=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
    ):
        """Read tokens (B, N), or embeddings (B, N, D), on from a state.

        Args:
            input_ids: (B, N) token ids.
            attention_mask: (B, N) or, as ``generate`` passes it, (B, all tokens so far); zeros are
                padding, on either side, and leave the state alone.
            past_key_values: the :class:`MCSDState` of an earlier call.
            inputs_embeds: (B, N, D) in place of ``input_ids``.
            position_ids: (B, N), of use only where they return to 0: a packed document starts.
            reset: (B, N) bool, True where a packed document starts; instead of ``position_ids``.

        Raises:
            ValueError: for inputs that contradict each other, and for attentions, of which a model
                without attention has none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("[MCSDModel] give exactly one of input_ids and inputs_embeds.")
        if output_attentions:
            raise ValueError("[MCSDModel] output_attentions must be false: there is no attention.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, N, _ = x.shape
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        mask = None
        if attention_mask is not None:
            shape = tuple(attention_mask.shape)
            if len(shape) != 2 or shape[0] != B or shape[1] < N:
                raise ValueError(
                    f"[MCSDModel] attention_mask must be ({B}, {N} or more) but is {shape}."
                )
            mask = attention_mask[:, -N:].bool()
        if reset is None and position_ids is not None:
            reset = position_ids.expand(B, N) == 0
        read = 0 if past_key_values is None else past_key_values.seen
        earlier = [None] * len(self.layers) if past_key_values is None else past_key_values.layers
        timeline = self.layers[0].mixer.timeline(x, earlier[0], mask, reset)
        states, seen = [], []
        for layer, state in zip(self.layers, earlier, strict=True):
            seen.append(x)
            x, state = layer(x, state, timeline)
            states.append(state)
        x = self.norm(x)
        return MCSDModelOutput(
            last_hidden_state=x,
            past_key_values=MCSDState(states, read + N) if use_cache else None,
            hidden_states=(*seen, x) if output_hidden_states else None,
        )


class MCSDForCausalLM(MCSDPreTrainedModel, GenerationMixin):
    """MCSD with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(self, config):
        super().__init__(config)
        self.model = MCSDModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        position_ids=None,
        reset=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
        logits_to_keep=0,
        num_items_in_batch=None,
    ):
        """Logits (B, N, K), the state, and the mean loss where ``labels`` (B, N) are given.

        Labels of -100 do not count. ``logits_to_keep`` computes only so many last positions (0:
        all); the other arguments are those of :meth:`MCSDModel.forward`.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            reset=reset,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return MCSDCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )


MCSDConfig.register_for_auto_class()
MCSDForCausalLM.register_for_auto_class("AutoModelForCausalLM")
