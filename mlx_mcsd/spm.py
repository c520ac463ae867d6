"""A SentencePiece model as a Hugging Face tokenizer, built from the model's own specification.

SentencePiece does to a text, in this order: user-defined symbols are set aside; the character map
rewrites the rest, longest match first; spaces at the ends go and runs of them shrink; a space is
put before the text (or after it); spaces become "▁"; what is left is cut into pieces, user-defined
symbols whole. Each step is one or two components of `tokenizers` here. What cannot be had exactly
so is refused, and `tokenizer.check_ids` compares the ids on texts.
"""

import re
from functools import lru_cache

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from .errors import MCSDError

SPACE = "▁"
# No text has them, and they end a grapheme (unassigned, of class Control).
BREAK, REMOVED = "\ufff0", "\ufff1"
# Stand for user-defined symbols while the character map runs; private use, plane 16.
FIRST_STAND_IN, STAND_INS = 0x10F000, 0xF00
# Each costs a search of the text.
MOST_RULES = 256
# Far above what trainers make; the work on a piece grows with its square.
LONGEST_PIECE = 2000


def check(spec):
    """Refuse what SentencePiece takes but no trainer writes.

    Raises:
        ValueError: saying what.
    """
    special = [getattr(spec.trainer_spec, f"{kind}_piece") for kind in ("unk", "bos", "eos", "pad")]
    for text in (*special, *(p.piece for p in spec.pieces)):
        if not isinstance(text, str):  # the parser gives bytes for what is no UTF-8
            raise ValueError("a piece is no text")
        if len(text) > LONGEST_PIECE:
            raise ValueError(f"a piece has {len(text)} characters")


def build(spec, *, bos=True, eos=False):
    """Return a `tokenizers.Tokenizer` with the ids of a SentencePiece model.

    Args:
        spec: a `ModelProto`, BPE, unigram or characters.
        bos: put the model's BOS, if it has one, before every text.
        eos: put its EOS, if it has one, after every text.

    Raises:
        MCSDError: for a model of words, one with unused pieces, or one whose character map has more
            rules of its own than can be written down.
    """
    trainer, normal = spec.trainer_spec, spec.normalizer_spec
    kinds = {trainer.BPE, trainer.UNIGRAM, trainer.CHAR}
    if not spec.pieces or trainer.model_type not in kinds:
        raise MCSDError(
            "[tokenizer] tokenizer.model must be a SentencePiece model of kind BPE, unigram or "
            "characters but is none; supply a tokenizer.json."
        )
    if unused := [p.piece for p in spec.pieces if p.type == p.UNUSED]:
        raise MCSDError(
            f"[tokenizer] a SentencePiece model must use all its pieces but {unused[0]!r} is "
            "marked unused; supply a tokenizer.json."
        )
    symbols = [p.piece for p in spec.pieces if p.type == p.USER_DEFINED]
    if trainer.model_type == trainer.UNIGRAM:
        model, whole = _unigram(spec), symbols
    else:
        whole = [s for s in symbols if len(s) > 1]
        model = _bpe(spec, ignore_merges=bool(whole))
    tokenizer = Tokenizer(model)
    if steps := _normalizers(spec, symbols):
        tokenizer.normalizer = normalizers.Sequence(steps)
    cuts = [pre_tokenizers.Split(Regex(_any(whole)), "isolated")] if whole else []
    if trainer.model_type == trainer.UNIGRAM and trainer.byte_fallback:
        # Bytes are pieces like all others to `tokenizers`; a text that looks like one is no match.
        cut = "<(?=0x[0-9A-F]{2}>)"
        cuts.append(pre_tokenizers.Split(Regex(cut), "merged_with_previous"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = _decoder(normal)
    control = [p.piece for p in spec.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in control])
    begin, end = (
        piece if wanted and piece in control else None
        for wanted, piece in ((bos, trainer.bos_piece), (eos, trainer.eos_piece))
    )
    if begin or end:
        around = {t: tokenizer.token_to_id(t) for t in (begin, end) if t}
        single = [t for t in (begin, "$A", end) if t]
        pair = [f"{t}:1" for t in (begin, "$B", end) if t]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(single),
            pair=" ".join(single + pair),
            special_tokens=list(around.items()),
        )
    return tokenizer


def _bpe(spec, ignore_merges):
    """Pieces in order of score, which is the order of the merges; a symbol is never part of one."""
    ids = {p.piece: i for i, p in enumerate(spec.pieces)}
    merges = []
    if spec.trainer_spec.model_type == spec.trainer_spec.BPE:
        normal = [p for p in spec.pieces if p.type == p.NORMAL]
        words = {p.piece for p in normal}
        for piece in sorted(normal, key=lambda p: -p.score):
            splits = ((piece.piece[:k], piece.piece[k:]) for k in range(1, len(piece.piece)))
            pairs = [pair for pair in splits if words.issuperset(pair)]
            merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    options = {"ignore_merges": True} if ignore_merges else {}
    return models.BPE(
        ids,
        merges,
        unk_token=spec.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=spec.trainer_spec.byte_fallback,
        **options,
    )


def _unigram(spec):
    """Pieces with their scores; an unknown one has the least less ten, in both libraries."""
    unknown = next((i for i, p in enumerate(spec.pieces) if p.type == p.UNKNOWN), None)
    least = min((p.score for p in spec.pieces if p.type == p.NORMAL), default=0.0)
    scores = [
        (p.piece, p.score if p.type in (p.NORMAL, p.USER_DEFINED) else least) for p in spec.pieces
    ]
    return models.Unigram(scores, unknown, spec.trainer_spec.byte_fallback)


def _decoder(normal):
    """Bytes joined to characters, marks to spaces; the form by which mlx-lm picks its streamer."""
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if normal.escape_whitespaces:
        steps.insert(0, decoders.Replace(SPACE, " "))
        if normal.add_dummy_prefix or normal.remove_extra_whitespaces:
            steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _normalizers(spec, symbols):
    """The components that turn a text into what is cut into pieces, in order."""
    normal = spec.normalizer_spec
    rewrite = _character_map(normal.precompiled_charsmap)
    mark = SPACE if normal.escape_whitespaces else " "
    before, after = [], []
    run = normalizers.Sequence(rewrite).normalize_str if rewrite else str
    # The others come out as they went in, and need no stand-in.
    changing = sorted((s for s in symbols if " " in s or run(s) != s), key=len, reverse=True)
    if len(changing) > STAND_INS:
        raise MCSDError(
            f"[tokenizer] at most {STAND_INS} user-defined symbols may be such as the normaliser "
            f"changes but {len(changing)} are; supply a tokenizer.json."
        )
    for i, symbol in enumerate(changing):
        stand_in = chr(FIRST_STAND_IN + i)
        before.append(normalizers.Replace(symbol, stand_in))
        after.append(normalizers.Replace(stand_in, symbol.replace(" ", mark)))
    steps = before + rewrite
    if normal.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if normal.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if normal.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{mark}+" + r"\z"), ""))
    if normal.add_dummy_prefix:
        if spec.trainer_spec.treat_whitespace_as_suffix:
            # (?m): a dot may be a newline.
            steps.append(normalizers.Replace(Regex(r"(?m)(?<=.)\z"), mark))
        else:
            steps.append(normalizers.Prepend(mark))
    return steps + after


@lru_cache(maxsize=8)
def _character_map(charsmap):
    """The components that rewrite characters as a precompiled map does; a list, empty for none.

    `Precompiled` rewrites graphemes, wrongly where one has several characters (it drops the rest,
    or misses a composition), and fails on a text that begins with a character that is removed. So
    those are set aside before, and graphemes are broken up. Compositions, which are nearly all
    of the longer rules in SentencePiece's own maps, are made by NFC after; what is left of the
    longer rules is replaced first. Every rule is exact so; a text with several accents on one
    letter may come out with its accents in the order of Unicode.
    """
    if not charsmap:
        return []
    rules = _rules(charsmap)
    single = {s: t for s, t in rules.items() if len(s) == 1}
    longer = {s: t for s, t in rules.items() if len(s) > 1}

    def characters(text):
        return "".join(single.get(c, c) for c in text)

    compose = normalizers.NFC().normalize_str
    composed = {s for s, t in longer.items() if compose(characters(s)) == t}
    others = {}
    for source, target in longer.items():
        if source not in composed:
            others.setdefault((-len(source), target), []).append(source)
    if len(others) > MOST_RULES:
        raise MCSDError(
            f"[tokenizer] the normaliser may have at most {MOST_RULES} rules for several "
            f"characters beyond NFKC's but has {len(others)}; supply a tokenizer.json."
        )
    steps, after = [], []
    for i, (_, target) in enumerate(sorted(others)):  # the longest first
        stand_in = chr(FIRST_STAND_IN + STAND_INS + i)  # no later step rewrites it
        steps.append(normalizers.Replace(Regex(_any(others[_, target])), stand_in))
        after.append(normalizers.Replace(stand_in, target))
    if removed := [s for s, t in single.items() if not t]:
        steps.append(normalizers.Replace(Regex(_any(removed)), REMOVED))
    if len(single) > len(removed):
        # (?m): a dot may be a newline. Not at the start, where tokenizers cannot insert.
        joined = r"(?m)(?<=.)(?=[\p{M}\x{200c}\x{200d}\x{ff9e}\x{ff9f}\x{1f3fb}-\x{1f3ff}\n])"
        prepended = r"(?<=[\x{600}-\x{605}\x{6dd}\x{70f}\x{890}\x{891}\x{8e2}])"
        steps.append(normalizers.Replace(Regex(f"{joined}|{prepended}"), BREAK))
        steps.append(normalizers.Precompiled(charsmap))
        steps.append(normalizers.Replace(BREAK, ""))
    if composed:
        steps.append(normalizers.NFC())
    if removed:
        steps.append(normalizers.Replace(REMOVED, ""))
    return steps + after


def _rules(charsmap):
    """Source -> target of every rule of a precompiled character map.

    The map is the size of a trie, the trie (a double array in 32-bit units: the child of a node by
    a byte lies at the node's base xor that byte, which is its label), and the targets, each ending
    in a zero byte.
    """
    try:
        size = int.from_bytes(charsmap[:4], "little")
        units = np.frombuffer(charsmap[4 : 4 + size], "<u4").astype(np.int64)
        targets = charsmap[4 + size :]
        place = np.arange(len(units))
        base = place ^ ((units >> 10) << ((units >> 6) & 8))
        label = units & 0xFF
        is_node = (units >> 31 == 0) & (label > 0)
        children = place[is_node]
        parent_base = children ^ label[is_node]
        order = np.argsort(parent_base, kind="stable")
        children, parent_base = children[order], parent_base[order]

        rules = {}
        nodes, sources = np.zeros(1, np.int64), [b""]
        while len(nodes) and len(sources[0]) < 256:
            first = np.searchsorted(parent_base, base[nodes])
            count = np.searchsorted(parent_base, base[nodes], "right") - first
            parents = np.repeat(np.arange(len(nodes)), count)
            within = np.arange(len(parents)) - np.repeat(np.cumsum(count) - count, count)
            nodes = children[np.repeat(first, count) + within]
            sources = [sources[p] + bytes((b,)) for p, b in zip(parents, label[nodes], strict=True)]
            for i in np.flatnonzero(units[nodes] >> 8 & 1):
                start = int(units[base[nodes[i]]]) & 0x7FFFFFFF
                end = targets.index(b"\0", start)
                rules[sources[i].decode()] = targets[start:end].decode()
    except (ValueError, IndexError) as error:
        raise MCSDError(
            "[tokenizer] the normaliser of tokenizer.model must be a precompiled map of characters "
            f"but is damaged: {error}."
        ) from None
    return rules


def _any(strings):
    """A regular expression for any of some strings, the longest first."""
    longest_first = sorted(strings, key=len, reverse=True)
    return "|".join("".join(map(_literal, s)) for s in longest_first)


def _literal(character):
    return character if re.match(r"\w", character) else rf"\x{{{ord(character):x}}}"
