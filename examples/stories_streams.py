"""Endless streams of stories, conversations and books for training, by the seed alone."""

import random
from itertools import zip_longest

import numpy as np
from stories_requests import ASSISTANT, USER, conversations

PARTS = 4  # deals that one pass over the stories takes
DRILL_STEPS = 25  # of training that a deal of drills takes


class Streams:
    """(B, N + 1) token segments; every row continues itself until the next deal of documents.

    A deal is a part of a pass over the stories, some of them as answers in conversations, and as
    much of the books as ``book_share`` says: in full until ``books_flat`` of the training, then
    less and less, and none from ``books_until`` on. At first and when the books are gone, for so
    many steps each as ``drills`` says, there are only drills, and behind both, less and less,
    ``drill_share`` of them beside the rest: a name is kept in mind over pages only by what keeps it
    over a line, and books, with few of these names, make that fade.
    """

    def __init__(self, processor, stories, books, requests, args):
        self.processor, self.stories, self.requests, self.args = processor, stories, requests, args
        # Every source of books in turn, until it is used up.
        self.books = [passage for each in zip_longest(*books) for passage in each if passage]
        self.deal = self.cursor = self.book = 0
        self.at, self.rows = 0.0, None

    def state(self):
        """What a checkpoint must keep."""
        return {"deal": self.deal, "cursor": self.cursor, "book": self.book, "at": self.at}

    def restore(self, state):
        """Stand where a checkpoint stood."""
        self.deal, self.book, self.at = state["deal"], state["book"], state["at"]
        self._lay_out()
        self.cursor = state["cursor"]

    def book_share(self, progress):
        """Part of the tokens that come from books."""
        args = self.args
        left = (args.books_until - progress) / max(args.books_until - args.books_flat, 1e-9)
        return args.book_share * min(1.0, max(0.0, left))

    def encode(self, document):
        """BOS, tokens, EOS; a conversation as the chat template writes it."""
        bos, eos = self.processor.bos_id(), self.processor.eos_id()
        if isinstance(document, str):
            return [bos, *self.processor.encode(document), eos]
        user, assistant = map(self.processor.piece_to_id, (USER, ASSISTANT))
        tokens = [bos]
        for request, reply in document:
            asked, told = self.processor.encode([request, reply])
            tokens += [user, *asked, assistant, *told, eos]
        return tokens

    def _drills(self, rng, tokens, far):
        """Encoded drills of so many tokens."""
        drills = []
        while tokens > 0:
            drills.append(np.array(self.encode(self.requests.drill(rng, far)), np.int16))
            tokens -= len(drills[-1])
        return drills

    def _documents(self, rng, order):
        """Encoded stories and books of a deal, and the first book after them."""
        args = self.args
        # In the end, names are as frequent again as the stories have them.
        rename = args.rename * (1 - self.at)
        shares = {"plain": args.plain, "rename": rename, "rename_asked": args.rename_asked}
        documents = conversations(order, self.requests, rng, **shares)
        encoded = [np.array(self.encode(document), np.int16) for document in documents]
        share = self.book_share(self.at)
        wanted = share / (1 - share) * sum(map(len, encoded)) if self.books else 0
        book = self.book
        while wanted > 0:
            encoded.append(np.array(self.encode(self.books[book % len(self.books)]), np.int16))
            wanted, book = wanted - len(encoded[-1]), book + 1
        share = args.drill_share[self.at >= args.books_until] * (1 - self.at)
        encoded += self._drills(rng, share / (1 - share) * sum(map(len, encoded)), far=1.0)
        return encoded, book

    def _lay_out(self):
        args = self.args
        epoch, part = divmod(self.deal, PARTS)
        order = random.Random(f"{args.seed}/{epoch}").sample(self.stories, len(self.stories))
        rng = random.Random(f"{args.seed}/{epoch}/{part}")
        step = round(self.at * args.steps)
        begins = (0, round(args.books_until * args.steps))
        # A deal of stories ends where drills begin.
        steps = min((begin - step for begin in begins if begin > step), default=args.steps)
        for begin, drills in zip(begins, args.drills, strict=True):
            left = begin + drills - step
            if begin <= step and left > 0:
                steps = min(left, DRILL_STEPS)
                far = max(0.0, 1 - 2 * left / drills)  # from the middle on
                encoded = self._drills(rng, args.batch * (steps * args.length + 1), far)
                self.next_book = self.book
                break
        else:
            encoded, self.next_book = self._documents(rng, order[part::PARTS] or order)
        rng.shuffle(encoded)
        tokens = np.concatenate(encoded)[: args.batch * (steps * args.length + 1)]
        # What the user says, and that a document begins, is nothing to learn.
        user, assistant = map(self.processor.piece_to_id, (USER, ASSISTANT))
        asked = np.cumsum((tokens == user).astype(int) - (tokens == assistant))
        ignored = (asked > 0) | (tokens == self.processor.bos_id()) | (tokens == assistant)
        width = len(tokens) // args.batch
        used = slice(width * args.batch)
        self.rows = tokens[used].reshape(args.batch, width)
        self.ignored = ignored[used].reshape(args.batch, width)
        self.cursor = 0

    def next(self, progress):
        """The next segment, which of its tokens are no targets, and whether the rows start anew."""
        fresh = self.rows is None
        if not fresh and self.cursor + self.args.length + 1 > self.rows.shape[1]:
            self.deal, self.book, fresh = self.deal + 1, self.next_book, True
        if fresh:
            self.at = progress
            self._lay_out()
        segment = slice(self.cursor, self.cursor + self.args.length + 1)
        self.cursor += self.args.length
        return self.rows[:, segment].astype(np.int64), self.ignored[:, segment], fresh
