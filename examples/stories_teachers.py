"""Learn from models that were trained before: from what they say together of every next token."""

from pathlib import Path

import torch
from torch.nn import functional as F

from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM, MCSDState
from mlx_mcsd.errors import MCSDError


class Teachers:
    """The mean of the models' probabilities, each with a state of its own carried along the rows.

    Apart they are overconfident in different places, together they know more than any of them, and
    a student that learns from them (Hinton et al., 2015, at temperature 1) learns few stories less
    by heart. Names it learns from the text alone: it is to keep them in mind, and teachers guess.

    Args:
        folders: Hugging Face directories of MCSD models.
        tokenizer: the student's SentencePiece model, as bytes; theirs must be the same.
        is_name: (K,) bool, the tokens that are names.
        share: of the teachers in the loss of other tokens, a, from 0 to 1.

    Raises:
        MCSDError: a folder is no such directory, or its tokenizer is another.
    """

    def __init__(self, folders, tokenizer, is_name, share):
        for folder in map(Path, folders):
            if not (folder / "model.safetensors").is_file():
                raise MCSDError(f"a teacher must be a Hugging Face directory but {folder} is none.")
            if (folder / "tokenizer.model").read_bytes() != tokenizer:
                raise MCSDError(
                    f"teachers must have the student's tokenizer but {folder} has another; train "
                    "both on the same stories."
                )
        self.models = [MCSDForCausalLM.from_pretrained(folder).eval() for folder in folders]
        self.carried = [None] * len(self.models)
        self.is_name, self.share = is_name, share

    @torch.no_grad()
    def probabilities(self, inputs, reset, fresh):
        """Mean of softmax(z) over the models, (B, N, K) float32.

        Args:
            inputs: (B, N) int64 tokens that follow those of the last call, or, where ``fresh``,
                follow nothing.
            reset: (B, N) bool, where a document begins.
        """
        total = 0
        for i, model in enumerate(self.models):
            past = None if fresh or self.carried[i] is None else MCSDState(self.carried[i])
            out = model.model(inputs, reset=reset, past_key_values=past, use_cache=True)
            self.carried[i] = [*out.past_key_values.layers]
            total = total + torch.softmax(model.lm_head(out.last_hidden_state).float(), -1)
        return total / len(self.models)

    def pull(self, logits, targets, probabilities):
        """a (CE(p, z) - CE(y, z)), the sum over all y that are no names.

        Added to CE(y, z), the sum over all y, it puts the teachers in the place of a share of the
        text. CE is -sum p ln softmax(z), y standing for a p that is 1 there.

        Args:
            logits: z, (B N, K) float32, the student's.
            targets: y, (B N) int64, -100 where there is nothing to learn.
            probabilities: p, (B, N, K) of :meth:`probabilities`.
        """
        taught = (targets >= 0) & ~self.is_name[targets.clamp(min=0)]
        logits, theirs = logits[taught], probabilities.flatten(0, 1)[taught]
        gap = F.cross_entropy(logits, theirs, reduction="sum")
        return self.share * (gap - F.cross_entropy(logits, targets[taught], reduction="sum"))
