"""A conversation as the text a model reads: its chat template, or a plain one where it has none.

The plain one has no names in it. A model that was never taught to chat goes on with a text, so this
is a text that two write in turn: a reply goes on where the message before it ends, and the message
after it begins a line.
"""

from collections.abc import Sequence

from .errors import MCSDError

Message = tuple[str, str]
"""A role ("system", "user" or "assistant") and a text."""


def render(tokenizer, messages: Sequence[Message], *, reply: bool = False, **options) -> str:
    """The text of a conversation.

    Args:
        tokenizer: mlx-lm's.
        messages: (role, text), oldest first.
        reply: end where the assistant's next message begins.
        options: further arguments of the chat template.

    Raises:
        MCSDError: if the chat template refuses the messages.
    """
    if not tokenizer.has_chat_template:
        text = ""
        for role, content in messages:
            begins_line = text and role != "assistant" and not text.endswith("\n")
            text += f"\n{content}" if begins_line else content
        return text
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages],
            tokenize=False,
            add_generation_prompt=reply,
            **options,
        )
        text.encode()  # half a character, which no tokenizer takes
        return text
    # A template is a program of the model's maker: this is what one may run into.
    except (
        *(TemplateError, ArithmeticError, LookupError, RecursionError),
        *(AttributeError, TypeError, ValueError),
    ) as error:
        from .loading import one_line

        raise MCSDError(f"the chat template refuses these messages: {one_line(error)}") from error


def encode(tokenizer, text: str, *, first: bool) -> list[int]:
    """Tokens of a stretch of a conversation; ``first``: nothing was read before it.

    A chat template writes the token that begins a text by itself; to a plain text it is added.
    """
    plain = not tokenizer.has_chat_template
    return tokenizer.encode(text, add_special_tokens=plain and first)
