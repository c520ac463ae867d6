"""Learn from models that were trained before: from their mean probabilities of the next token."""

import hashlib
from pathlib import Path

import torch
from torch.nn import functional as F

from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM, MCSDState
from mlx_mcsd.errors import MCSDError


class Teachers:
    """An ensemble to distil from, each of its models with a state of its own along the rows.

    The mean of several models' probabilities is better than any of them, and a student that learns
    from it (Hinton et al., 2015, at temperature 1) learns few stories less by heart. Names it
    learns from the text alone: it is to keep them in mind, and teachers guess them.

    Args:
        folders: Hugging Face directories of MCSD models.
        tokenizer: the student's SentencePiece model, as bytes; theirs must be the same.
        is_name: (K,) bool, the tokens that are names.
        weight: of the distillation, w, from 0 to 1.

    Raises:
        MCSDError: a folder is no such directory, its tokenizer is another, or w is out of range.
    """

    def __init__(self, folders, tokenizer, is_name, weight):
        if not 0 <= weight <= 1:
            raise MCSDError(f"--distill must lie between 0 and 1 but is {weight}.")
        self.models = [self._load(Path(folder), tokenizer) for folder in folders]
        self.digests = [
            hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()
            for folder in folders
        ]
        self.states = [None] * len(self.models)
        self.is_name, self.weight = is_name, weight

    @staticmethod
    def _load(folder, tokenizer):
        try:
            theirs = (folder / "tokenizer.model").read_bytes()
            model, found = MCSDForCausalLM.from_pretrained(folder, output_loading_info=True)
            whole = not any(found.values())
        except Exception:  # whatever transformers makes of a folder that is something else
            whole = False
        if not whole:
            raise MCSDError(
                f"a teacher must be the folder hf of a run that has ended but {folder} is not; "
                "train it anew, or leave it out."
            )
        if theirs != tokenizer:
            raise MCSDError(
                f"a teacher must have the student's tokenizer but {folder} has another; train both "
                "on the same stories."
            )
        return model.eval()

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
            past = None if fresh else MCSDState(self.states[i])
            out = model.model(inputs, reset=reset, past_key_values=past, use_cache=True)
            self.states[i] = out.past_key_values.layers
            total = total + torch.softmax(model.lm_head(out.last_hidden_state).float(), -1)
        return total / len(self.models)

    def distil(self, losses, logits, targets, probabilities):
        """(1 - w) CE(y, z) + w CE(p, z) of every token; where y is a name or nothing, w = 0.

        Args:
            losses: CE(y, z), (B N) float32.
            logits: z, (B N, K) float32, the student's.
            targets: y, (B N) int64, -100 where there is nothing to learn.
            probabilities: p, (B, N, K) of :meth:`probabilities`; CE(p, z) = -sum p ln softmax(z).
        """
        distilled = (targets >= 0) & ~self.is_name[targets.clamp(min=0)]
        soft = F.cross_entropy(logits, probabilities.flatten(0, 1), reduction="none")
        return losses + self.weight * distilled * (soft - losses)
