"""Bits per character of whole stories, and the scale of the logits that makes them fewest."""

import math

import numpy as np
import torch
from torch.nn import functional as F


def padded(encoded):
    """Batches of stories, each beginning anew: (inputs, targets), -100 behind their ends."""
    for start in range(0, len(encoded), 16):
        rows = [torch.from_numpy(ids.astype(np.int64)) for ids in encoded[start : start + 16]]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        yield batch.clamp(min=0)[:, :-1], batch[:, 1:]


def calibrate(model, encoded):
    """Scale the final norm's gain, and so all logits z, to fit stories y best; return the scale s.

    Temperature scaling (Guo et al., 2017): min of CE(y, s z), convex in s, over 1/2 <= s <= 2. A
    student learns from teachers on stories that they know by heart, and becomes as sure of others.

    Args:
        model: an MCSDForCausalLM; its final norm changes in place.
        encoded: stories that it has not learned from, int arrays of tokens, BOS and EOS included.
    """
    model.eval()
    with torch.no_grad():
        logits, targets = zip(
            *[(model(x, use_cache=False).logits[y >= 0], y[y >= 0]) for x, y in padded(encoded)],
            strict=True,
        )
    logits, targets = torch.cat(logits), torch.cat(targets)
    scale = torch.ones((), requires_grad=True)
    optimizer = torch.optim.LBFGS([scale], line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        entropy = F.cross_entropy(scale * logits, targets)
        entropy.backward()
        return entropy

    optimizer.step(loss)
    with torch.no_grad():
        scale.clamp_(0.5, 2.0)
        model.model.norm.weight *= scale
    return scale.item()


@torch.no_grad()
def bits_per_character(model, encoded, texts):
    """Bits per character of whole stories, EOS included, each from an empty state."""
    model.eval()
    nats = 0.0
    for inputs, targets in padded(encoded):
        logits = model(inputs, use_cache=False).logits
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    model.train()
    return nats / math.log(2) / sum(map(len, texts))
