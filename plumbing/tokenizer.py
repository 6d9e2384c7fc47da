"""Captions to token ids: byte-pair encodings, and captions that are class numbers."""

import base64
import re
from collections import Counter
from pathlib import Path

import tiktoken
import torch

ASSETS = Path(__file__).parent.parent / "assets"
VOCABULARIES = ("captions", "emoji")  # assets/NAME.tiktoken
PAD, NULL = 0, 1  # the null caption is what guidance uses; a vocabulary's own ids come after these
WORD = r" ?[^\s,]+|,|\s+"  # a word includes the space before it, so that a common word is one token
LETTERS = r"[^\W\d_]+(?:['’-][^\W\d_]+)*"  # a word as people count them: "don't", "t-shirt"
MOST_WORDS = 200_000  # that a run keeps of its captions


class Tokenizer:
    """Byte-pair ids of a tiktoken encoding, shifted by two to leave room for PAD and NULL. vocabulary: the text of its
    .tiktoken file, which checkpoints store, or None. cut: how many captions encode() has truncated so far. A vocabulary
    without capitals, but for single bytes, was made of captions without them: others are put into lower case."""

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
        """Whether the vocabulary does not know a fourth or more of a caption's words: most of a word's tokens are then
        single bytes. Numbers and single letters do not count."""
        words = [word for word in re.findall(WORD, caption) if re.search(r"[^\W\d_]{2}", word)]
        single = [[len(self.encoding.decode_single_token_bytes(i)) == 1 for i in self.ordinary(word)] for word in words]
        return 0 < len(words) <= 4 * sum(sum(bytes) > len(bytes) / 2 for bytes in single)

    def encode(self, captions, length):
        """B captions -> ids (B, length) int64, truncated or padded with PAD."""
        ids = torch.full((len(captions), length), PAD)
        for row, caption in zip(ids, captions):
            tokens = self.tokens(caption)
            self.cut += len(tokens) > length
            row[:len(tokens)] = torch.tensor(tokens[:length])
        return ids

    def decode(self, ids):
        """Ids (L,) -> the caption; PAD and NULL are dropped."""
        return self.encoding.decode([i - 2 for i in torch.as_tensor(ids).tolist() if i > NULL])


class ClassNumbers(Tokenizer):
    """Captions that are class numbers: "class 207" has the id 2 + 207, and an empty caption, for any class, NULL."""

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
    """The tokenizer `name`: "captions" (shapes, garments and digits, a token for each word), "emoji", or another file
    NAME.tiktoken of `python data.py vocab`; "gpt2", which tiktoken downloads once; "classes" or "classes:N", numbers of
    ImageNet's 1,000 classes or of N. vocabulary: the text of the file, from a checkpoint; the file then need not exist.
    Raises ValueError for any other name or a damaged file, OSError where a file is missing or gpt2 cannot be had."""
    if name in VOCABULARIES or name.endswith(".tiktoken"):
        path = ASSETS / f"{name}.tiktoken" if name in VOCABULARIES else Path(name)
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
    """The words of captions, in lower case, a set."""
    return set(re.findall(LETTERS, " ".join(captions).lower()))


def survey(captions, tokenizer, text_len, most=1.0):
    """Says in a line what share of captions text_len cuts and what share falls apart, and what would help. Raises
    ValueError with that line where one of them is more than `most`."""
    lengths = sorted(len(tokenizer.tokens(caption)) for caption in captions) or [0]
    cut = sum(length > text_len for length in lengths) / len(lengths)
    apart = sum(map(tokenizer.falls_apart, captions)) / len(lengths)
    line = f"of {len(captions):,} captions, {cut:.1%} are longer than text_len {text_len} and cut"
    line += f" (text_len {lengths[-1 - len(lengths) // 100]} would hold 99%)" if cut else ""
    line += f", {apart:.1%} fall apart into bytes, of words that the vocabulary does not know" if apart else ""
    line += " (`python data.py vocab --data_dir=SHARDS --out=NAME.tiktoken` makes one)" if apart else ""
    if max(cut, apart) > most:
        raise ValueError(f"{line}; bad_captions is {most}: --bad_captions=1 trains all the same")
    return line


def train_bpe(words, vocab_size):
    """Byte-pair encoding of `words`, a Counter of byte strings: merges the most frequent pair of tokens until there are
    `vocab_size` tokens or every word is one. Returns the tokens by rank, the 256 bytes first."""
    vocab = [bytes([b]) for b in range(256)]
    splits = {word: [bytes([b]) for b in word] for word in words}
    while len(vocab) < vocab_size:
        pairs = Counter()
        for word, parts in splits.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties are broken by the pair itself
        vocab.append(left + right)
        for parts in splits.values():
            for i in range(len(parts) - 1, 0, -1):
                if parts[i - 1:i + 1] == [left, right]:
                    parts[i - 1:i + 1] = [left + right]
    return vocab


def make_vocabulary(captions, size=512):
    """The bytes of a .tiktoken file of at most `size` tokens for such captions: a line a token, base64 and rank."""
    words = Counter(word.encode() for caption in captions for word in re.findall(WORD, caption))
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(train_bpe(words, size)))
