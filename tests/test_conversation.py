"""A conversation becomes the text of the model's template, or a plain one."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

import tiny
from mlx_mcsd.conversation import encode, render
from mlx_mcsd.errors import MCSDError

TALK = [("system", "Be kind."), ("user", "Hi\n"), ("assistant", "a b"), ("user", "Bye")]
TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    tiny.write_tokenizer(tmp_path)
    return TokenizerWrapper(PreTrainedTokenizerFast.from_pretrained(tmp_path))


def with_template(tokenizer, template):
    tokenizer._tokenizer.chat_template = template
    return TokenizerWrapper(tokenizer._tokenizer)


def test_without_a_template_two_write_one_text_in_turn(tokenizer):
    assert render(tokenizer, TALK) == "Be kind.\nHi\na b\nBye"
    assert render(tokenizer, [*TALK, ("assistant", " now.")]) == "Be kind.\nHi\na b\nBye now."
    assert render(tokenizer, TALK, reply=True) == render(tokenizer, TALK)


def test_a_template_is_used_where_there_is_one(tokenizer):
    tokenizer = with_template(tokenizer, TEMPLATE)
    text = "<s>[system]Be kind.\n[user]Hi\n\n[assistant]a b\n[user]Bye\n"
    assert render(tokenizer, TALK) == text
    assert render(tokenizer, TALK, reply=True) == f"{text}[assistant]"


def test_a_template_that_refuses_is_the_users_error(tokenizer):
    tokenizer = with_template(tokenizer, "{{ raise_exception('only users talk here') }}")
    with pytest.raises(MCSDError, match="refuses these messages: only users talk here"):
        render(tokenizer, TALK)


def test_the_token_that_begins_a_text_comes_once(tokenizer):
    begin = tokenizer.bos_token_id
    assert encode(tokenizer, "a", first=True)[0] == begin
    assert begin not in encode(tokenizer, "a", first=False)
    tokenizer = with_template(tokenizer, TEMPLATE)
    ids = encode(tokenizer, render(tokenizer, TALK), first=True)
    assert (ids[0], ids.count(begin)) == (begin, 1)
