"""Captions to token ids: byte-pair encodings, and captions that are class numbers."""

import base64
import heapq
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from tqdm import tqdm

from plumbing.paths import at_home

ASSETS = Path(__file__).parent.parent / "assets"
VOCABULARIES = ("captions", "emoji")  # assets/NAME.tiktoken
PAD, NULL = 0, 1  # the null caption is what guidance uses; a vocabulary's own ids come after these
WORD = r" ?[^\s,]+|,|\s+"  # a word includes the space before it, so that a common word is one token
LETTERS = r"[^\W\d_]+(?:['’-][^\W\d_]+)*"  # a word as people count words: "don't", "t-shirt"
MOST_WORDS = 200_000  # words of its captions that a run keeps, at most
MOST_BYTES = 20_000_000  # of the different words that make a vocabulary, at most: some minutes and 4 GB


class Tokenizer:
    """Byte-pair ids of a tiktoken encoding, shifted by two to leave room for PAD and NULL.

    vocabulary: the text of its .tiktoken file, which checkpoints store, or None. cut: how many captions encode() has
    truncated so far. folds: whether captions are put into lower case, as they are for a vocabulary without capitals.
    """

    def __init__(self, encoding, vocabulary=None):
        self.encoding, self.vocabulary, self.cut = encoding, vocabulary, 0
        self.vocab_size = encoding.n_vocab + 2
        several = [token for token in encoding.token_byte_values() if len(token) > 1]
        self.folds = bool(several) and all(token == token.lower() for token in several)

    def ordinary(self, caption):
        return self.encoding.encode_ordinary(caption.lower() if self.folds else caption)

    def tokens(self, caption):
        """All ids of one caption, a list; [NULL] for an empty or blank one."""
        return [i + 2 for i in self.ordinary(caption.strip())] or [NULL]

    def falls_apart(self, caption):
        """Whether a fourth or more of a caption's words are unknown, and so are split into mostly single bytes.

        Numbers and single letters do not count as words.
        """
        words = [word for word in re.findall(WORD, caption) if re.search(r"[^\W\d_]{2}", word)]
        single = [[len(self.encoding.decode_single_token_bytes(i)) == 1 for i in self.ordinary(word)] for word in words]
        return 0 < len(words) <= 4 * sum(sum(bytes) > len(bytes) / 2 for bytes in single)

    def encode(self, captions, length):
        """Token ids (B, length), int64, of B captions, truncated or padded with PAD."""
        ids = torch.full((len(captions), length), PAD)
        for row, caption in zip(ids, captions):
            tokens = self.tokens(caption)
            self.cut += len(tokens) > length
            row[:len(tokens)] = torch.tensor(tokens[:length])
        return ids

    def decode(self, ids):
        """The caption of ids (L,), without PAD and NULL."""
        return self.encoding.decode([i - 2 for i in torch.as_tensor(ids).tolist() if i > NULL])


class ClassNumbers(Tokenizer):
    """Captions that are class numbers: "class 207" has the id 2 + 207; an empty caption, for any class, has NULL."""

    def __init__(self, classes):
        self.classes, self.vocab_size, self.vocabulary, self.cut = classes, classes + 2, None, 0

    def tokens(self, caption):
        """The id of a caption, a list. Raises ValueError for one that is not a class."""
        match = re.fullmatch(r"(?:class (\d+))?", caption.strip())
        if not match or int(match[1] or 0) >= self.classes:
            raise ValueError(f"caption {caption!r} is not a class: write 'class 0' to 'class {self.classes - 1}', "
                             "or nothing for any class")
        return [int(match[1]) + 2 if match[1] else NULL]

    def falls_apart(self, caption):
        return False


def get_tokenizer(name="captions", vocabulary=None):
    """The tokenizer `name`.

    "captions": the words of shapes, garments and digits, one token each. "emoji". NAME.tiktoken: a file made by `python
    data.py vocab`. "gpt2": downloaded by tiktoken once. "classes:N": class numbers; "classes": the 1,000 of ImageNet.
    vocabulary: the text of the file, from a checkpoint; the file is then not needed. Raises ValueError for another name
    or a damaged file, OSError for a missing file or if gpt2 is not available.
    """
    if name in VOCABULARIES or name.endswith(".tiktoken"):
        path = ASSETS / f"{name}.tiktoken" if name in VOCABULARIES else Path(at_home(name))
        try:
            text = vocabulary or path.read_text("ascii")
            ranks = {base64.b64decode(token, validate=True): int(rank)
                     for token, rank in map(str.split, text.splitlines())}
            return Tokenizer(tiktoken.Encoding(name, pat_str=WORD, mergeable_ranks=ranks, special_tokens={},
                                               explicit_n_vocab=max(256, len(ranks))), text)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"vocabulary {path} is damaged: make it with `python data.py vocab`") from error
    if name == "gpt2":
        try:
            return Tokenizer(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # tiktoken downloads with requests, whose errors are many
            raise ConnectionError("tokenizer 'gpt2' is not available: tiktoken needs the network once, or a folder "
                                  "in TIKTOKEN_CACHE_DIR that has it; or use tokenizer='captions'") from error
    if match := re.fullmatch(r"classes(?::([1-9]\d*))?", name):
        return ClassNumbers(int(match[1] or 1000))
    raise ValueError(f"tokenizer {name!r} is unknown; there are {', '.join(VOCABULARIES)}, a file NAME.tiktoken, gpt2, "
                     "classes and classes:N")


def words(captions):
    """The set of the captions' words, in lower case."""
    return set(re.findall(LETTERS, " ".join(captions).lower()))


def survey(captions, tokenizer, text_len, most=1.0):
    """A line that says which share of captions is cut, has too many unknown words, or is refused, and what would help.

    The line is "" if there is no such caption. Raises ValueError with the line where one of the shares is above
    `most`.
    """
    lengths, refusals = [], []
    for caption in captions:
        try:
            lengths.append(len(tokenizer.tokens(caption)))
        except ValueError as error:
            refusals.append(str(error))
    lengths, count = sorted(lengths) or [0], len(captions) or 1
    cut = sum(length > text_len for length in lengths) / count
    apart = sum(map(tokenizer.falls_apart, captions)) / count
    refused = len(refusals) / count
    faults = [f"{cut:.1%} are longer than text_len {text_len} and cut (text_len {lengths[-1 - len(lengths) // 100]} "
              "would hold 99%)"] if cut else []
    faults += [f"{apart:.1%} have too many words that the vocabulary does not know (`python data.py vocab "
               "--data_dir=SHARDS --out=NAME.tiktoken` makes one)"] if apart else []
    faults += [f"{refused:.1%} are refused, the first because {refusals[0]}"] if refusals else []
    line = f"of {len(captions):,} captions, {' and '.join(faults)}" if faults else ""
    if max(cut, apart, refused) > most:
        raise ValueError(f"{line}; bad_captions is {most}: set --bad_captions=1 to train anyway")
    return line


class Candidate(NamedTuple):
    """A pair of tokens that may be merged, and its count when it was noted.

    Heaps give the most frequent pair first; of equally frequent ones, the last by its bytes.
    """

    count: int
    pair: tuple

    def __lt__(self, other):
        return tuple.__gt__(self, other)  # since heapq gives the least first


class Splits:
    """Words split into tokens, at first into bytes, with the count of each pair of neighbours.

    All words stand in one linked list, with a None around each; a place is a position in the list. A merge takes time
    in proportion to the pair's places, so long words, such as sentences of Chinese, take no longer than short ones.
    """

    def __init__(self, words):
        self.tokens, self.weights = [None], [0]
        for word, count in words.items():
            self.tokens += [word[i:i + 1] for i in range(len(word))] + [None]
            self.weights += [count] * (len(word) + 1)
        self.before = list(range(-1, len(self.tokens) - 1))
        self.after = list(range(1, len(self.tokens) + 1))
        self.counts, self.places = Counter(), defaultdict(list)  # places may be out of date
        for place in range(len(self.tokens) - 1):
            self.gain(place)

    def pair_at(self, place):
        """The token at a place and the next one in its word; None at the ends of words and where a merge left none."""
        left, right = self.tokens[place], self.tokens[self.after[place]]
        return None if left is None or right is None else (left, right)

    def gain(self, place):
        pair = self.pair_at(place)
        if pair:
            self.counts[pair] += self.weights[place]
            self.places[pair].append(place)
        return pair

    def lose(self, place):
        pair = self.pair_at(place)
        if pair:
            self.counts[pair] -= self.weights[place]

    def merge(self, pair):
        """Merge each occurrence of a pair into one token; return the pairs that the new token is part of."""
        joined, gained = pair[0] + pair[1], set()
        for place in sorted(self.places.pop(pair), reverse=True):  # from the right: of "aaa" the last two
            if self.pair_at(place) != pair:
                continue
            before, right = self.before[place], self.after[place]
            self.lose(before)
            self.lose(place)
            self.lose(right)
            self.tokens[place], self.tokens[right] = joined, None
            self.after[place] = self.after[right]
            self.before[self.after[place]] = place
            gained.update((self.gain(before), self.gain(place)))
        return {pair for pair in gained if self.counts[pair]}


def train_bpe(words, vocab_size):
    """Byte-pair encoding of `words`, a Counter of byte strings: the tokens by rank, the 256 bytes first.

    The most frequent pair of tokens is merged until there are `vocab_size` tokens, or every word is one token.
    """
    vocab, splits = [bytes([b]) for b in range(256)], Splits(words)
    heap = [Candidate(count, pair) for pair, count in splits.counts.items()]
    heapq.heapify(heap)
    bar = tqdm(total=vocab_size - len(vocab), desc="merges", unit="token", leave=False)
    while heap and len(vocab) < vocab_size:
        count, pair = heapq.heappop(heap)
        now = splits.counts[pair]
        if now == count:
            vocab.append(pair[0] + pair[1])
            for gained in splits.merge(pair):
                heapq.heappush(heap, Candidate(splits.counts[gained], gained))
            bar.update()
        elif now:  # other merges have taken some of its places
            heapq.heappush(heap, Candidate(now, pair))
    bar.close()
    return vocab


def commonest(words, most):
    """The most common of `words`, a Counter of byte strings, with at most `most` bytes in all."""
    kept, held = {}, 0
    for word, count in words.most_common():
        held += len(word)
        if held > most:
            break
        kept[word] = count
    return kept


def make_vocabulary(captions, size=512):
    """The bytes of a .tiktoken file made from captions: a line per token, base64 and rank.

    It has at most `size` tokens, but always the 256 bytes. If the different words have more than MOST_BYTES bytes in
    all, only the most common are used.
    """
    words = Counter(word.encode() for caption in captions for word in re.findall(WORD, caption))
    vocab = train_bpe(commonest(words, MOST_BYTES), size)
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(vocab))
