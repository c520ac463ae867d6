"""Configuration of the PyTorch MCSD reference (arXiv 2406.12230) for Hugging Face transformers."""

from transformers import PretrainedConfig

SECTIONS = (
    ["slope", "decay"],
    ["slope"],
    ["decay"],
    ["slope", "slope"],
    ["decay", "decay"],
)


class MCSDConfig(PretrainedConfig):
    """Every key of the MCSD checkpoint layout, with its constraints checked.

    Args:
        vocab_size: number of tokens, K.
        hidden_size: width of the residual stream, D; divisible by ``num_channels``.
        num_channels: head-like groups, C; at most 20, since from 21 on the slowest decay rounds
            to 1.0 in float32.
        num_hidden_layers: L.
        intermediate_size: width of the MLP, F.
        projection: ``"channel"`` (one Dc x Dc matrix per channel, Eqs. 1 and 7) or ``"dense"``.
        fusion: ``"add"`` (Eq. 21) or ``"concat"`` (Eq. 13, which needs ``output_projection``).
        output_projection: whether the block ends with a linear layer back to D.
        sections: one of the five pairings of slope and decay, see Fig. 9.
        mixer: name of the token mixer, always ``"mcsd"`` here.
        hidden_act: ``"gelu"`` (exact), ``"gelu_pytorch_tanh"`` or ``"silu"``.
        max_position_embeddings: training context; informative, nothing breaks past it.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """

    model_type = "mcsd"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds to a list)

    def __init__(
        self,
        vocab_size=2048,
        hidden_size=256,
        num_channels=8,
        num_hidden_layers=4,
        intermediate_size=704,
        projection="channel",
        fusion="add",
        output_projection=False,
        sections=("slope", "decay"),
        mixer="mcsd",
        initializer_range=0.02,
        hidden_act="gelu",
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_channels = num_channels
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.projection = projection
        self.fusion = fusion
        self.output_projection = output_projection
        self.sections = list(sections) if isinstance(sections, list | tuple) else sections
        self.mixer = mixer
        self.initializer_range = initializer_range
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self._check()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    def _check(self):
        def expect(ok, key, expected):
            if not ok:
                got = getattr(self, key)
                raise ValueError(f"[MCSDConfig] {key} must be {expected} but got {got!r}.")

        for key in (
            "vocab_size",
            "hidden_size",
            "num_channels",
            "num_hidden_layers",
            "intermediate_size",
        ):
            value = getattr(self, key)
            expect(type(value) is int and value > 0, key, "a positive integer")
        for key in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, key)
            expect(type(value) in (int, float) and value > 0, key, "a positive number")
        expect(isinstance(self.output_projection, bool), "output_projection", "true or false")
        whole = self.hidden_size % self.num_channels == 0
        expect(whole, "hidden_size", f"divisible by num_channels ({self.num_channels})")
        expect(self.num_channels <= 20, "num_channels", "at most 20")
        expect(self.projection in ("channel", "dense"), "projection", '"channel" or "dense"')
        expect(self.fusion in ("add", "concat"), "fusion", '"add" or "concat"')
        expect(
            self.fusion == "add" or self.output_projection,
            "output_projection",
            'true with fusion "concat"',
        )
        expect(self.sections in SECTIONS, "sections", f"one of {SECTIONS}")
        expect(self.mixer == "mcsd", "mixer", '"mcsd"')
        expect(
            self.hidden_act in ("gelu", "gelu_pytorch_tanh", "silu"),
            "hidden_act",
            '"gelu", "gelu_pytorch_tanh" or "silu"',
        )
