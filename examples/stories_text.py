"""Clean story files for training: repair mojibake, restore capitals, split, hold out a slice.

Two layouts are read: stories separated by ``<|endoftext|>``, or lower-case stories one after the
other, a single newline between stories and an empty line between paragraphs. Lower-case text
gets its capitals back from word statistics of the cased text, so that both train one model.
"""

import lzma
import random
import re
from collections import Counter, defaultdict

from mlx_mcsd.errors import MCSDError

SEPARATOR = "<|endoftext|>"
GIVEN = re.compile(r"\b(?:named|called|name was|name is) ([a-z]{3,})\b")
WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*|[^A-Za-z]")


def read_text(path):
    """The text of a UTF-8 file, plain or .xz."""
    opener = lzma.open if str(path).endswith(".xz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise MCSDError(f"cannot read {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise MCSDError(f"{path} must be UTF-8 text, plain or .xz, but: {error}.") from error


def repair(text):
    """Write UTF-8 punctuation that was read as cp1252 in ASCII."""
    lossy = {
        "\u00e2\u20ac\u0153": '"',
        "\u00e2\u20ac\u2122": "'",
        "\u00e2\u20ac\u02dc": "'",
        "\u00e3\u00a9": "\u00e9",  # lower-cased on the way
    }
    for wrong, right in lossy.items():
        text = text.replace(wrong, right)
    # A right double quote lost its last byte, or kept it as another character.
    return re.sub("\u00e2\u20ac[\u009d\u201c\u201d]?", '"', text)


def join_paragraphs(pieces, shortest):
    """Put together again what single newlines inside a story have split, and leave out the rest.

    Pieces of less than ``shortest`` characters, one after the other, are the paragraphs of one
    story, until the next begins as stories do. What is still shorter is a part of one.
    """
    stories, ended = [], True
    for piece in pieces:
        short = len(piece) < shortest
        if not short or ended or piece.lower().startswith(("once", "one day")):
            stories.append(piece)
        else:
            stories[-1] += "\n" + piece
        ended = not short
    return [story for story in stories if len(story) >= shortest]


def split_stories(text, shortest=300):
    """The stories of a text in either layout; ``shortest`` is for the one without separators."""
    text = text.replace("\r\n", "\n")
    if SEPARATOR in text:
        stories = [piece.strip() for piece in text.split(SEPARATOR)]
    else:
        pieces = [piece.strip() for piece in re.split(r"(?<!\n)\n(?!\n)", text)]
        stories = join_paragraphs(pieces, shortest)
    # A file cut at some size ends in half a story, which would teach the model to stop anywhere.
    return [s for s in stories if s and s[-1] in ".!?\"'\u201d"]


def sentence_words(text):
    """Yield (token, what precedes it, opens a sentence) over a text.

    What precedes a word is the lower-case word before it, or, after a closing quote, the quote
    with its last mark (``!"``), since ``"Hello!" he said`` and ``"Hello." He left`` differ.
    """
    start, previous, quoted, mark = True, None, False, ""
    for token in WORD.findall(text):
        if token[0].isalpha():
            yield token, previous, start
            start, previous, mark = False, token.lower(), ""
            continue
        yield token, None, False
        if token == '"':
            quoted = not quoted
            start, previous = quoted, None if quoted else mark + '"'
        elif token in ".!?\n":
            start, previous = True, None
            quoted = quoted and token != "\n"
        elif token not in " ')":
            previous = None
        mark = mark if token in " ')" else token


class Truecaser:
    """Restores capitals by how cased text writes a word inside a sentence, after its neighbour."""

    def __init__(self, texts):
        self.word, self.pair = defaultdict(Counter), defaultdict(Counter)
        for text in texts:
            for token, previous, start in sentence_words(text):
                if token[0].isalpha() and not start:
                    self.pair[previous, token.lower()][token] += 1
                    if previous is None or previous[-1] != '"':
                        self.word[token.lower()][token] += 1

    def __call__(self, text):
        """Lower-case text with capitals at sentence starts, in names and after opening quotes."""
        out = []
        for token, previous, start in sentence_words(text):
            if token[0].isalpha():
                seen = self.pair.get((previous, token)) or self.word.get(token)
                token = seen.most_common(1)[0][0] if seen else token
                token = token[0].upper() + token[1:] if start else token
            out.append(token)
        text = "".join(out)
        # A name that no cased story has is one all the same where somebody is given it.
        for name in set(GIVEN.findall(text)):
            if name not in self.word and (None, name) not in self.pair:
                text = re.sub(rf"\b{name}\b", name.capitalize(), text)
        return text


def held_out(stories, share, seed):
    """Split stories into (training, held out); the same seed gives the same slice."""
    order = list(range(len(stories)))
    random.Random(seed).shuffle(order)
    unseen = set(order[: max(1, round(share * len(stories)))])
    return (
        [s for i, s in enumerate(stories) if i not in unseen],
        [s for i, s in enumerate(stories) if i in unseen],
    )


def ten_words(text):
    """Every run of ten words of a text, in lower case."""
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + 10]) for i in range(len(words) - 9)}


def load_stories(cased, lower=(), share=0.05, seed=0):
    """Read story files and hold out a slice of the cased ones.

    Args:
        cased: paths of files with capitals.
        lower: paths of lower-case files, which are given capitals and used for training only.
        share: part of the cased stories to hold out.
        seed: of the split.

    Returns:
        (training stories, held-out stories), lists of strings.
    """
    stories = [s for path in cased for s in split_stories(repair(read_text(path)))]
    if len(stories) < 2:
        raise MCSDError(
            f"{', '.join(map(str, cased))} must hold two stories or more, one of them to hold out, "
            f"but holds {len(stories)}; {SEPARATOR} stands between stories."
        )
    train, unseen = held_out(stories, share, seed)
    if lower:
        truecase = Truecaser(train)
        for path in lower:
            train += [truecase(s) for s in split_stories(repair(read_text(path)))]
    # The same story may stand in two files: what is mostly known is not unseen.
    known = set().union(*map(ten_words, train))
    return train, [s for s in unseen if len(ten_words(s) - known) * 2 >= len(ten_words(s))]


def load_books(paths, length=2000):
    """Passages of about ``length`` characters from longer texts, cut between paragraphs."""
    passages = []
    for path in paths:
        passage = ""
        for paragraph in re.split(r"\n\s*\n", repair(read_text(path))):
            paragraph = " ".join(paragraph.split())
            if not paragraph or paragraph.startswith("#"):
                continue
            passage += paragraph + "\n"
            if len(passage) >= length:
                passages.append(passage.strip())
                passage = ""
    return passages
