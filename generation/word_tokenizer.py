"""Split blocks of texts into words and number the words: the compiled tokenizer of the label metrics.

Pure: imports no Ray and reads no files. `paper` mode is that of `rouge_score`: lower case, and a word is a run of `[a-z0-9]`.
`unicode` mode is for every script. It first applies NFKC_Casefold of Unicode, which unifies compatible forms, folds case and
removes invisible characters such as joiners. Then:

- a word is a run of letters and digits with their marks; any other character separates words;
- a letter of a script without spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar) is a separate word;
- a sign belongs to a number directly after it, unless a word is directly before it: "-5" differs from "5", while "3-5" is
  "3" and "5";
- in a text without any word ("+", an emoji) each character is a word, except white space.

In both modes, a stemmed vocabulary applies the Porter stemmer to words of more than three ASCII letters and digits, as
`rouge_score` does. Words are compared by all their characters. Hashes only select table slots, so a collision costs time
and never changes a label.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

Mode = Literal["paper", "unicode"]

# Kinds of characters, as bits.
_SPACE, _SYMBOL, _SIGN, _MARK, _SINGLE, _DIGIT, _LETTER = 0, 1, 2, 4, 8, 16, 32
_BEGINS = _SINGLE | _DIGIT | _LETTER

# Default_Ignorable_Code_Point of Unicode, without U+200B, which separates words.
_IGNORED = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# The blocks of scripts without spaces between words: Thai and Lao; Khmer; Myanmar; Han and Kana.
_UNSPACED = (
    *((0x0E00, 0x0F00), (0x1780, 0x1800), (0x1000, 0x10A0), (0xA9E0, 0xAA00), (0xAA60, 0xAA80)),
    *((0x2E80, 0x2FE0), (0x3005, 0x3100), (0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00)),
    *((0x1AFF0, 0x1B170), (0x20000, 0x40000)),
)

# A chunk of a word is a 64-bit number of its characters: 8 bits for an ASCII character, 24 for any other. At or above
# these values, a chunk has no space for another character.
_FULL_FOR_ASCII, _FULL = np.uint64(1 << 56), np.uint64(1 << 40)
_ONE = np.uint64(1)
_ROOT = np.int64(-1)
_SLOT = np.dtype([("chunk", np.uint64), ("parent", np.int32), ("number", np.int32)])

# A vocabulary that could become half full is cleared. It has at most 2^19 words, about 100 MB, however long a run is.
_SLOTS = 1 << 20
_ASCII_WORD = re.compile("[a-z0-9]{4,}")


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of arrays at its first call; numba caches the code on disk if it finds a writable folder."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    """Return the stemmer of `rouge_score`. NLTK is imported here, because its import is slow and most processes need no stemmer."""
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


class Vocabulary:
    """A numbering of words: equal numbers mean equal words, after stemming if `stemmed`.

    Numbers are valid within the result of one `split`, because a later call can clear the table. A lock serializes threads.
    """

    def __init__(self, mode: Mode, stemmed: bool) -> None:
        self._codes, self._kinds = (_paper_codes, _paper_kinds()) if mode == "paper" else (_unicode_codes, _unicode_kinds())
        self._stemmed = stemmed
        self._lock = threading.Lock()
        self._clear(_SLOTS)

    def split(self, texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return `words` (int32), `begins` and `ends` (int64); the words of text i are `words[begins[i] : ends[i]]`.

        The texts have no nulls.
        """
        ascii_ = pc.string_is_ascii(texts)
        plain = texts.filter(ascii_)
        codes, codes_at = self._codes(texts.filter(pc.invert(ascii_)).to_pylist())
        with self._lock:
            max_chunks = plain.nbytes + len(codes)
            if 2 * (self._chunk_count[0] + max_chunks) > len(self._table):
                self._clear(max(_SLOTS, 1 << (2 * max_chunks).bit_length()))
            words, at = self._number(*_ascii_codes(plain))
            more, more_at = self._number(codes, codes_at)
        # The words of the ASCII texts come first, then those of the others; `index` restores the order of the texts.
        begins, ends = np.concatenate([at[:-1], more_at[:-1] + len(words)]), np.concatenate([at[1:], more_at[1:] + len(words)])
        index = np.empty(len(texts), np.int64)
        index[np.argsort(~ascii_.to_numpy(zero_copy_only=False), kind="stable")] = np.arange(len(texts))
        return np.concatenate([words, more]), begins[index], ends[index]

    def _number(self, codes: np.ndarray, text_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of each word, and the offsets of the words of each text, [texts + 1]."""
        words, at, new = _split_words(codes, text_at, self._kinds, self._table, self._chunk_count)
        numbers = self._table["number"]
        for position, slot, start, stop in new:
            if numbers[slot] < 0:
                word = "".join(map(chr, codes[start:stop])).lower()
                if self._stemmed and _ASCII_WORD.fullmatch(word):
                    word = _stemmer().stem(word)
                numbers[slot] = self._number_of.setdefault(word, len(self._number_of))
            words[position] = numbers[slot]
        return words, at

    def _clear(self, slots: int) -> None:
        """Clear the vocabulary and allocate a table of `slots` slots."""
        self._table = np.zeros(slots, _SLOT)
        self._table["number"] = -1
        self._number_of: dict[str, int] = {}
        self._chunk_count = np.zeros(1, np.int64)


@lru_cache(maxsize=4)
def vocabulary(mode: Mode, *, stemmed: bool) -> Vocabulary:
    """Return the vocabulary of a mode, stemmed or not, that this process shares."""
    return Vocabulary(mode, stemmed)


def _paper_codes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters of texts, concatenated (uint8, "?" for every non-ASCII character), and the text offsets.

    `rouge_score` converts to lower case first. That turns two non-ASCII characters into ASCII letters: U+212A (Kelvin sign)
    and U+0130 (dotted I).
    """
    texts = [text.replace("\u212a", "k").replace("\u0130", "i?") for text in texts]
    return np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8), _text_offsets(texts)


def _unicode_codes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters of texts in NFKC_Casefold, concatenated (uint32), and the text offsets.

    U+2212 (minus sign) becomes a hyphen, so that both mean the same sign.
    """
    texts = [_IGNORED.sub("", unicodedata.normalize("NFKC", text).casefold()) for text in texts]
    texts = [unicodedata.normalize("NFKC", text).replace("\u2212", "-") for text in texts]
    return np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32), _text_offsets(texts)


def _text_offsets(texts: Sequence[str]) -> np.ndarray:
    """Return the start of each text and the end of the last, in characters, [texts + 1]."""
    return np.array([0, *accumulate(map(len, texts))], np.int32)


def _paper_kinds() -> np.ndarray:
    """Return the kind of every ASCII character."""
    kinds = np.full(128, _SPACE, np.uint8)
    kinds[list(b"abcdefghijklmnopqrstuvwxyz0123456789")] = _LETTER
    return kinds


def _unicode_kinds() -> np.ndarray:
    """Return the kind of every code point."""
    of = {"L": _LETTER, "M": _MARK, "Nd": _DIGIT, "N": _LETTER, "Z": _SPACE, "Cc": _SPACE, "Cf": _SPACE}
    names = map(unicodedata.category, map(chr, range(0x110000)))
    kinds = np.fromiter((of.get(name, of.get(name[0], _SYMBOL)) for name in names), np.uint8, 0x110000)
    for first, beyond in _UNSPACED:
        block = kinds[first:beyond]
        block[block == _LETTER] = _SINGLE
    kinds[list(b"+-")] = _SIGN
    return kinds


def _ascii_codes(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters of ASCII texts, concatenated (uint8), and the text offsets, [texts + 1]."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int32)
    return np.frombuffer(data, np.uint8), np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]


@compiled
def _split_words(
    codes: np.ndarray, text_at: np.ndarray, kinds: np.ndarray, table: np.ndarray, chunk_count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.int64, np.uint64, np.uint64]]]:
    """Split texts into words, with ASCII letters in lower case; text i is `codes[text_at[i] : text_at[i + 1]]`.

    Returns the number of each word (-1 for a new word), the word offsets of the texts, and a list of the new words. Its
    entries are (position in the words, slot, start, stop); the characters of the word are `codes[start:stop]`.
    """
    codes = _ascii_lower(codes)
    words = np.empty(len(codes), np.int32)
    at = np.zeros(len(text_at), np.int64)
    new = []
    found = 0
    for text in range(len(text_at) - 1):
        begin, end = np.uint64(text_at[text]), np.uint64(text_at[text + 1])
        for any_character in (False, True):
            if found > at[text]:
                break
            position = begin
            while position < end:
                start = position
                kind = kinds[codes[start]]
                position += _ONE
                if any_character:
                    if kind == _SPACE:
                        continue
                    continued_by = 0
                elif kind & _BEGINS or (kind == _SIGN and _is_number_sign(codes, start, begin, end, kinds)):
                    continued_by = _MARK if kind == _SINGLE else _MARK | _DIGIT | _LETTER
                else:
                    continue
                slot = _ROOT
                chunk = _append_character(np.uint64(0), codes[start])
                while position < end and kinds[codes[position]] & continued_by:
                    code = codes[position]
                    if chunk >= (_FULL_FOR_ASCII if code < 128 else _FULL):
                        slot = _find_or_add_chunk(slot, chunk, table, chunk_count)
                        chunk = np.uint64(0)
                    chunk = _append_character(chunk, code)
                    position += _ONE
                slot = _find_or_add_chunk(slot, chunk, table, chunk_count)
                words[found] = table[slot].number
                if words[found] < 0:
                    new.append((found, slot, start, position))
                found += 1
        at[text + 1] = found
    return words[:found], at, new


@compiled
def _ascii_lower(codes: np.ndarray) -> np.ndarray:
    lowered = np.empty_like(codes)
    for position in range(len(codes)):
        code = codes[position]
        lowered[position] = code + 32 if 65 <= code <= 90 else code
    return lowered


@compiled
def _is_number_sign(codes: np.ndarray, sign: np.uint64, begin: np.uint64, end: np.uint64, kinds: np.ndarray) -> bool:
    """Return whether a digit is directly after the sign and no word directly before it, in the text from `begin` to `end`."""
    if sign + _ONE == end or kinds[codes[sign + _ONE]] != _DIGIT:
        return False
    return sign == begin or not kinds[codes[sign - _ONE]] & (_BEGINS | _MARK)


@compiled
def _append_character(chunk: np.uint64, code: np.unsignedinteger[Any]) -> np.uint64:
    """Append a character to a chunk: one byte for ASCII, else three bytes, of which the first is above every ASCII code."""
    if code < 128:
        return (chunk << np.uint64(8)) | np.uint64(code)
    return (chunk << np.uint64(24)) | np.uint64(0x800000) | np.uint64(code)


@compiled
def _find_or_add_chunk(parent: np.int64, chunk: np.uint64, table: np.ndarray, chunk_count: np.ndarray) -> np.int64:
    """Return the slot of a chunk after the chunk in slot `parent`; add the chunk if it is new.

    `parent` is `_ROOT` for the first chunk of a word. The table uses open addressing, and a slot with chunk 0 is free. The
    slot of the last chunk identifies the word.
    """
    last = np.uint64(len(table) - 1)
    mixed = (chunk ^ (np.uint64(parent) << np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    slot = (mixed ^ (mixed >> np.uint64(32))) & last
    while table[slot].chunk != chunk or table[slot].parent != parent:
        if not table[slot].chunk:
            table[slot].chunk = chunk
            table[slot].parent = parent
            chunk_count[0] += 1
            break
        slot = (slot + _ONE) & last
    return np.int64(slot)
