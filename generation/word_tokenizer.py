"""Words as numbers, for a block of texts at once: the compiled tokeniser under the labels. Pure: no Ray, no files.

`paper` mode is `rouge_score`'s: lower case, words are the runs of `[a-z0-9]`. `unicode` mode is for every script: after
Unicode's NFKC_Casefold (compatible forms made one, case and invisible characters such as joiners gone),

- a word is a run of letters and digits with the marks on them; anything else parts words;
- a letter of a script that has no spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar) is a word of its own;
- a sign directly before a number, and not behind a word, belongs to it: "-5" is not "5", while "3-5" is "3" and "5";
- a text without any word ("+", an emoji) has its characters, but for white space, as words.

In both modes words of more than three ASCII letters and digits are Porter-stemmed (where asked for), as in `rouge_score`.
Words are told apart by all their characters; hashes only say where to look, so a collision costs time and never a label.
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

# Kinds of character, as bits.
_SPACE, _SYMBOL, _SIGN, _MARK, _SINGLE, _DIGIT, _LETTER = 0, 1, 2, 4, 8, 16, 32
_BEGINS = _SINGLE | _DIGIT | _LETTER

# Unicode's Default_Ignorable_Code_Point but for U+200B, which parts words.
_IGNORED = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# The blocks of scripts without spaces: Thai and Lao; Khmer; Myanmar; Han and Kana.
_UNSPACED = (
    *((0x0E00, 0x0F00), (0x1780, 0x1800), (0x1000, 0x10A0), (0xA9E0, 0xAA00), (0xAA60, 0xAA80)),
    *((0x2E80, 0x2FE0), (0x3005, 0x3100), (0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00)),
    *((0x1AFF0, 0x1B170), (0x20000, 0x40000)),
)

# A chunk of a word is a number of 64 bits, full when the next character (8 bits if ASCII, else 24) has no room.
_FULL_FOR_ASCII, _FULL = np.uint64(1 << 56), np.uint64(1 << 40)
_ONE = np.uint64(1)
_ROOT = np.int64(-1)
_SLOT = np.dtype([("chunk", np.uint64), ("parent", np.int32), ("number", np.int32)])

# A vocabulary that may get half full starts afresh: it holds at most 2^19 words (some 100 MB) however long a run is.
_SLOTS = 1 << 20
_ASCII_WORD = re.compile("[a-z0-9]{4,}")


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of arrays when it is first called; kept between processes where numba finds a folder it may write."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    """`rouge_score`'s stemmer; NLTK takes two seconds to import, which most processes need not wait for."""
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


class Vocabulary:
    """The words met so far, each with a number; equal numbers are equal words, after stemming if `stemmed`.

    Threads take turns. A number means the same only within one `split`.
    """

    def __init__(self, mode: Mode, stemmed: bool) -> None:
        self._codes, self._kinds = (_paper_codes, _paper_kinds()) if mode == "paper" else (_unicode_codes, _unicode_kinds())
        self._stemmed = stemmed
        self._turn = threading.Lock()
        self._start_afresh(_SLOTS)

    def split(self, texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return `words` (int32), `begins` and `ends` (int64): text i, which is not null, has `words[begins[i] : ends[i]]`."""
        ascii_ = pc.string_is_ascii(texts)
        plain = texts.filter(ascii_)
        codes, codes_at = self._codes(texts.filter(pc.invert(ascii_)).to_pylist())
        with self._turn:
            room = plain.nbytes + len(codes)
            if 2 * (self._entered[0] + room) > len(self._table):
                self._start_afresh(max(_SLOTS, 1 << (2 * room).bit_length()))
            words, at = self._number(*_ascii_codes(plain))
            more, more_at = self._number(codes, codes_at)
        # As the texts stand: first the plain ones, then the others.
        begins, ends = np.concatenate([at[:-1], more_at[:-1] + len(words)]), np.concatenate([at[1:], more_at[1:] + len(words)])
        place = np.empty(len(texts), np.int64)
        place[np.argsort(~ascii_.to_numpy(zero_copy_only=False), kind="stable")] = np.arange(len(texts))
        return np.concatenate([words, more]), begins[place], ends[place]

    def _number(self, codes: np.ndarray, text_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of each word, and where each text's words begin (and the last end)."""
        words, at, new = _split_words(codes, text_at, self._kinds, self._table, self._entered)
        numbers = self._table["number"]
        for place, slot, start, stop in new:
            if numbers[slot] < 0:
                word = "".join(map(chr, codes[start:stop])).lower()
                if self._stemmed and _ASCII_WORD.fullmatch(word):
                    word = _stemmer().stem(word)
                numbers[slot] = self._number_of.setdefault(word, len(self._number_of))
            words[place] = numbers[slot]
        return words, at

    def _start_afresh(self, slots: int) -> None:
        """Forget every word; have room for `slots / 2` chunks of words."""
        self._table = np.zeros(slots, _SLOT)
        self._table["number"] = -1
        self._number_of: dict[str, int] = {}
        self._entered = np.zeros(1, np.int64)


@lru_cache(maxsize=4)
def vocabulary(mode: Mode, *, stemmed: bool) -> Vocabulary:
    """Return this process's vocabulary of a mode, stemmed or not."""
    return Vocabulary(mode, stemmed)


def _paper_codes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters (uint8) of texts, end to end, and where each text begins (and the last ends), "?" for all but ASCII.

    `rouge_score` lowers first, which makes ASCII letters of two characters that are none, U+212A (Kelvin) and U+0130 (dotted I).
    """
    texts = [text.replace("\u212a", "k").replace("\u0130", "i?") for text in texts]
    return np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8), _text_offsets(texts)


def _unicode_codes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters (uint32) of texts in NFKC_Casefold, end to end, and where each text begins (and the last ends).

    The minus sign, U+2212, becomes the hyphen that stands for it.
    """
    texts = [_IGNORED.sub("", unicodedata.normalize("NFKC", text).casefold()) for text in texts]
    texts = [unicodedata.normalize("NFKC", text).replace("\u2212", "-") for text in texts]
    return np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32), _text_offsets(texts)


def _text_offsets(texts: Sequence[str]) -> np.ndarray:
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
    """Return the characters of ASCII texts, end to end, and where each text begins (and the last ends)."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int32)
    return np.frombuffer(data, np.uint8), np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]


@compiled
def _split_words(
    codes: np.ndarray, text_at: np.ndarray, kinds: np.ndarray, table: np.ndarray, entered: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.int64, np.uint64, np.uint64]]]:
    """Cut texts (text i is `codes[text_at[i] : text_at[i + 1]]`) into words; upper-case ASCII letters are lowered first.

    Return the number of each word (-1 where it has none yet), where each text's words begin (and the last end), and the place,
    slot, start and stop of each word without a number.
    """
    codes = _ascii_lower(codes)
    words = np.empty(len(codes), np.int32)
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
                    goes_on = 0
                elif kind & _BEGINS or (kind == _SIGN and _is_number_sign(codes, start, begin, end, kinds)):
                    goes_on = _MARK if kind == _SINGLE else _MARK | _DIGIT | _LETTER
                else:
                    continue
                slot = _ROOT
                chunk = _append_character(np.uint64(0), codes[start])
                while position < end and kinds[codes[position]] & goes_on:
                    code = codes[position]
                    if chunk >= (_FULL_FOR_ASCII if code < 128 else _FULL):
                        slot = _find_or_add_chunk(slot, chunk, table, entered)
                        chunk = np.uint64(0)
                    chunk = _append_character(chunk, code)
                    position += _ONE
                slot = _find_or_add_chunk(slot, chunk, table, entered)
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
    """Whether a digit is behind the sign and no word before it, in the text from `begin` to `end`."""
    if sign + _ONE == end or kinds[codes[sign + _ONE]] != _DIGIT:
        return False
    return sign == begin or not kinds[codes[sign - _ONE]] & (_BEGINS | _MARK)


@compiled
def _append_character(chunk: np.uint64, code: np.unsignedinteger[Any]) -> np.uint64:
    """Add a character to a chunk of a word: one byte if it is ASCII, else three, of which the first is above all ASCII."""
    if code < 128:
        return (chunk << np.uint64(8)) | np.uint64(code)
    return (chunk << np.uint64(24)) | np.uint64(0x800000) | np.uint64(code)


@compiled
def _find_or_add_chunk(parent: np.int64, chunk: np.uint64, table: np.ndarray, entered: np.ndarray) -> np.int64:
    """Return the slot of a chunk that follows the one in slot `parent` (`_ROOT` where it begins a word); a new one takes a slot.

    The table is open-addressed; a slot is free while its chunk is 0. A word is the chain of its chunks, so it has one slot.
    """
    last = np.uint64(len(table) - 1)
    mixed = (chunk ^ (np.uint64(parent) << np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    slot = (mixed ^ (mixed >> np.uint64(32))) & last
    while table[slot].chunk != chunk or table[slot].parent != parent:
        if not table[slot].chunk:
            table[slot].chunk = chunk
            table[slot].parent = parent
            entered[0] += 1
            break
        slot = (slot + _ONE) & last
    return np.int64(slot)
