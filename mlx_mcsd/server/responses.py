"""OpenAI's response objects, from the parts of a text."""

import re
import time
import uuid

from .protocol import Call, finite

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Reply:
    """Makes the JSON of one answer.

    Args:
        call: the request.
        model: the name to answer under.
        tokenizer: spells tokens.
    """

    def __init__(self, call: Call, model: str, tokenizer):
        self.call, self.tokenizer = call, tokenizer
        kind = "chat.completion" if call.chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if call.chat and call.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, int] = {}

    def whole(self, texts: list[str], tokens: list[list], finishes: list[str], usage: dict) -> dict:
        """The answer at once."""
        choices = []
        for i, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            body = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self.call.chat
                else {"text": text}
            )
            probabilities = self.probabilities(i, tokens[i])
            choices.append({"index": i, **body, "logprobs": probabilities, "finish_reason": finish})
        return {**self.head, "choices": choices, "usage": usage}

    def role(self, index: int) -> dict:
        """The first chunk of a text in a chat."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def chunk(self, index: int, text: str, tokens: list, finish: str | None, usage=None) -> dict:
        """A stretch of one text; with a finish, its last."""
        probabilities = self.probabilities(index, tokens)
        if not self.call.chat:
            body = {"text": text}
        else:
            body = {"delta": {"content": text} if text or probabilities else {}}
        return self._chunk(index, {**body, "logprobs": probabilities}, finish, usage)

    def usage(self, usage: dict) -> dict:
        """The last chunk, for whoever asked for it."""
        return {**self.head, "choices": [], "usage": usage}

    def probabilities(self, index: int, tokens: list) -> dict | None:
        """The log probabilities of tokens, in the form of the endpoint; None if not asked for."""
        if self.call.logprobs is None or not tokens:
            return None
        if self.call.chat:
            return {"content": [self._token(*token) for token in tokens], "refusal": None}
        texts = [self.spell(token)[0] for token, _, _ in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [finite(value) for _, value, _ in tokens],
            "top_logprobs": [
                {self.spell(other)[0]: finite(value) for other, value in best}
                for _, _, best in tokens
            ],
            "text_offset": offsets,
        }

    def spell(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text and its bytes; of a token that is part of a character, as far as known."""
        piece = self.tokenizer.convert_ids_to_tokens([token])[0]
        if byte := BYTE.fullmatch(piece):
            value = int(byte[1], 16)
            return (chr(value) if value < 128 else f"bytes:\\x{value:02x}"), [value]
        # After another token, so that a decoder that strips a text's first space keeps this one.
        before = self.tokenizer.decode([token])
        text = self.tokenizer.decode([token, token])[len(before) :] or before
        return text, None if "\ufffd" in text else list(text.encode())

    def _token(self, token: int, value: float, best: list) -> dict:
        text, spelled = self.spell(token)
        entry = {"token": text, "logprob": finite(value), "bytes": spelled}
        others = []
        for other, chance in best:
            text, spelled = self.spell(other)
            others.append({"token": text, "logprob": finite(chance), "bytes": spelled})
        return {**entry, "top_logprobs": others}

    def _chunk(self, index: int, body: dict, finish: str | None, usage=None) -> dict:
        choice = {"index": index, **body, "finish_reason": finish}
        return {**self.head, "choices": [choice], **({"usage": usage} if usage else {})}


def usage(prompt: int, cached: int, completion: int) -> dict:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
