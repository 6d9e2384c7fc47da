"""Captions to ids: byte pairs, vocabularies from files, and captions that are numbers of classes."""
import base64
import random
from collections import Counter

import pytest
import tiktoken
import torch

from plumbing import tokenizer
from plumbing.tokenizer import NULL, PAD, get_tokenizer


def test_encode_pads_truncates_and_marks_the_empty_caption():
    bpe = get_tokenizer("captions")
    ids = bpe.encode(["a red circle above a blue square", "", "  ", "a bag"], 4)
    assert ids.shape == (4, 4) and ids.dtype == torch.int64
    assert ids[1].tolist() == ids[2].tolist() == [NULL, PAD, PAD, PAD] == [1, 0, 0, 0]
    assert (ids[0] > 1).all() and (ids[3] > 1).tolist() == [True, True, False, False]
    assert ids[3, 2:].tolist() == [PAD] * 2
    assert torch.equal(bpe.encode(["a red circle above a blue square"], 9)[0, :4], ids[0])
    assert ids.max() < bpe.vocab_size
    assert bpe.encode([], 4).shape == (0, 4)


@pytest.mark.parametrize("text", ["a red circle and a blue square", "three green triangles", "A café, 3 naïve 猫!",
                                  "two  spaces\tand\na line"])
def test_decode_gives_the_caption_back(text):
    bpe = get_tokenizer()
    assert bpe.decode(bpe.encode([text], 64)[0]) == text.lower()
    assert bpe.decode(bpe.encode([""], 4)[0]) == ""  # the null caption


def test_bpe_merges_the_most_frequent_pair_first():
    vocab = tokenizer.train_bpe({b"abab": 3, b"bc": 4}, 300)
    assert vocab[256:] == [b"ab", b"bc", b"abab"]
    assert tokenizer.train_bpe({b"abab": 3, b"bc": 4}, 257)[256:] == [b"ab"]


def merged_one_by_one(words, vocab_size):
    """Byte-pair encoding as it is defined, all pairs counted again for each merge."""
    vocab, splits = [bytes([b]) for b in range(256)], {word: [bytes([b]) for b in word] for word in words}
    while len(vocab) < vocab_size:
        pairs = Counter()
        for word, parts in splits.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        vocab.append(left + right)
        for parts in splits.values():
            for i in range(len(parts) - 1, 0, -1):
                if parts[i - 1:i + 1] == [left, right]:
                    parts[i - 1:i + 1] = [left + right]
    return vocab


def test_counts_kept_up_to_date_are_counts_taken_anew():
    """Random words of few letters, whose runs and ties are what can go wrong."""
    draw = random.Random(0)
    for _ in range(300):
        letters, longest = b"abc"[:draw.randint(1, 3)], draw.choice((4, 12, 40))
        words = {bytes(draw.choices(letters, k=draw.randint(1, longest))): draw.randint(1, 5)
                 for _ in range(draw.randint(0, 12))}
        size = draw.choice((256, 258, 270, 400))
        assert tokenizer.train_bpe(words, size) == merged_one_by_one(words, size), (words, size)


def sentences(count, length):
    """Sentences without spaces, all different, of words of 1 to 3 of 2,000 Chinese characters, the first more often."""
    draw = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(2000)]
    weights = [1 / (i + 20) for i in range(2000)]
    words = ["".join(draw.choices(characters, weights, k=draw.randint(1, 3))) for _ in range(2000)]
    return ["".join(draw.choices(words, k=length)) for _ in range(count)]


@pytest.mark.slow
def test_work_for_a_vocabulary_grows_with_the_text_and_not_with_merges_times_text(tmp_path, monkeypatch):
    """Of a tenth of 20,000 captions without spaces, and of as much text in one: looks at a pair of neighbours."""
    looks, pair_at = [], tokenizer.Splits.pair_at

    def look(splits, place):
        looks.append(place)
        return pair_at(splits, place)

    monkeypatch.setattr(tokenizer.Splits, "pair_at", look)
    for captions in sentences(2000, 16), sentences(1, 32_000):
        looks.clear()
        text = tokenizer.make_vocabulary(captions, 4096)
        size = sum(len(caption.encode()) for caption in captions)
        assert len(looks) < 10 * size  # each merge counting everything anew: thousands
        (tmp_path / "zh.tiktoken").write_bytes(text)
        bpe = get_tokenizer(str(tmp_path / "zh.tiktoken"))
        tokens = bpe.tokens(captions[0])
        assert bpe.vocab_size == 4098 and bpe.decode(tokens) == captions[0]
        assert len(tokens) < 0.8 * len(captions[0])  # of 3 bytes each: tokens are characters, and words


def test_a_bar_shows_how_many_tokens_are_made(monkeypatch):
    moved = []

    class Bar:
        def __init__(self, total, **settings):
            moved.append(total)

        def update(self):
            moved.append(1)

        def close(self):
            moved.append("closed")

    monkeypatch.setattr(tokenizer, "tqdm", Bar)
    vocabulary = tokenizer.train_bpe(Counter({b"abab": 3, b"abc": 1}), 259)
    assert vocabulary[256:] == [b"ab", b"abab", b"abc"] and moved == [3, 1, 1, 1, "closed"]


def test_of_too_many_words_the_commonest_count(monkeypatch):
    words = Counter({b"aa": 5, b"bbb": 3, b"cc": 4})
    assert tokenizer.commonest(words, 7) == words and tokenizer.commonest(words, 6) == {b"aa": 5, b"cc": 4}
    assert tokenizer.commonest(words, 1) == {}
    monkeypatch.setattr(tokenizer, "MOST_BYTES", 6)
    text = tokenizer.make_vocabulary(["cc,aa", "bbb"], 300).decode()
    vocab = {base64.b64decode(line.split()[0]) for line in text.splitlines()[256:]}
    assert vocab == {b"cc", b"aa"}  # of the words "cc", ",", "aa" and "bbb", which is one byte too many


def test_gpt2_is_a_tokenizer_as_others_are(monkeypatch):
    """With the vocabulary of captions in place of its own, which is downloaded."""
    own = get_tokenizer("captions")
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": own.encoding}.get)
    found = get_tokenizer("gpt2")
    assert found.encode(["a bag", ""], 6).tolist() == own.encode(["a bag", ""], 6).tolist()
    assert found.vocab_size == own.vocab_size


def test_gpt2_without_a_network_names_the_remedies(monkeypatch):
    def offline(name):
        raise OSError("Max retries exceeded")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ConnectionError) as error:
        get_tokenizer("gpt2")
    for remedy in ("network", "TIKTOKEN_CACHE_DIR", "tokenizer='captions'"):
        assert remedy in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_tokenizer_names_the_known():
    with pytest.raises(ValueError, match="'bpe' is unknown; there are captions, emoji, .*, gpt2, classes and"):
        get_tokenizer("bpe")


def test_class_numbers_become_ids():
    bpe = get_tokenizer("classes")
    assert bpe.vocab_size == 1002
    assert bpe.encode(["class 207", "", " class 0 "], 2).tolist() == [[209, 0], [1, 0], [2, 0]]
    assert get_tokenizer("classes:10").vocab_size == 12
    for caption in ("class 1000", "class -1", "a dog", "class 7 8"):
        with pytest.raises(ValueError, match=f"{caption!r} is not a class: write 'class 0' to 'class 999'"):
            bpe.encode([caption], 1)


def test_captions_that_were_cut_are_counted():
    bpe = get_tokenizer()
    bpe.encode(["a red circle above a blue square", "a bag"], 4)
    bpe.encode(["three blue circles and more than that"], 4)
    assert bpe.cut == 2


def test_a_comma_is_a_token_of_its_own():
    bpe = get_tokenizer()
    red = bpe.tokens("a red, a red")
    assert red.count(bpe.tokens("a red")[-1]) == 2 and len(red) == 5


def test_a_vocabulary_of_some_captions_is_a_tokenizer(tmp_path):
    (tmp_path / "mine.tiktoken").write_bytes(tokenizer.make_vocabulary(["a blue whale", "a whale"], 300))
    bpe = get_tokenizer(str(tmp_path / "mine.tiktoken"))
    assert len(bpe.tokens("a blue whale")) == 3 and bpe.decode(bpe.encode(["a green whale"], 20)[0]) == "a green whale"


def test_the_stored_text_of_a_vocabulary_stands_in_for_its_file(tmp_path):
    path, captions = tmp_path / "mine.tiktoken", ["a blue whale", "a green whale", ""]
    path.write_bytes(tokenizer.make_vocabulary(captions, 300))
    bpe = get_tokenizer(str(path))
    ids, text = bpe.encode(captions, 8), bpe.vocabulary
    path.unlink()
    stored = get_tokenizer(str(path), text)
    assert torch.equal(stored.encode(captions, 8), ids) and stored.decode(ids[1]) == "a green whale"
    assert (stored.vocab_size, stored.vocabulary) == (bpe.vocab_size, text)
    assert get_tokenizer("classes:10").vocabulary is None  # nothing to store


def test_a_vocabulary_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.tiktoken"):
        get_tokenizer(str(tmp_path / "none.tiktoken"))
    for contents in (b"nonsense", b"YQ== 0\n", b"\xff 1 2\n"):
        (tmp_path / "bad.tiktoken").write_bytes(contents)
        with pytest.raises(ValueError, match="bad.tiktoken is damaged"):
            get_tokenizer(str(tmp_path / "bad.tiktoken"))


def test_capitals_are_folded_where_the_vocabulary_has_none(tmp_path):
    bpe = get_tokenizer()
    assert bpe.tokens("A RED CIRCLE") == bpe.tokens("a red circle") and len(bpe.tokens("A RED CIRCLE")) == 3
    assert torch.equal(bpe.encode(["Two Green Triangles"], 4), bpe.encode(["two green triangles"], 4))
    for name, captions in (("cased", ["The cat", "The dog"]), ("bytes", [])):
        (tmp_path / f"{name}.tiktoken").write_bytes(tokenizer.make_vocabulary(captions, 300))
        cased = get_tokenizer(str(tmp_path / f"{name}.tiktoken"))
        assert cased.tokens("The cat") != cased.tokens("the cat") and cased.decode(cased.tokens("The Cat")) == "The Cat"


def test_captions_of_unknown_words_fall_apart():
    bpe = get_tokenizer()
    for caption in ("a red circle", "A RED CIRCLE", "a 12", "12345 678", "x", "", "a red circle beside a blue square",
                    "a red, blue, green, yellow, cyan or purple giraffe"):
        assert not bpe.falls_apart(caption), caption
    for caption in ("my cat", "a photo of my cat", "eine Katze am Strand", "猫が座っている", "кошка"):
        assert bpe.falls_apart(caption), caption
    assert not get_tokenizer("classes").falls_apart("class 3")


def test_words_are_in_lower_case_and_without_punctuation():
    assert tokenizer.words(["A red circle, left of a blue square.", "Don't!", "a t-shirt 42 x3", "café\nnoir"]) == {
        "a", "red", "circle", "left", "of", "blue", "square", "don't", "t-shirt", "x", "café", "noir"}
    assert tokenizer.words([]) == tokenizer.words([""]) == set()


def test_a_survey_of_captions_says_what_is_wrong_and_what_would_help():
    bpe, good, long, odd = get_tokenizer(), ["a bag"] * 90, ["a red circle above a blue square"] * 10, ["my cat"] * 10
    assert tokenizer.survey(good, bpe, 4, 0.0) == ""
    said = tokenizer.survey(good + long, bpe, 4, 0.1)
    assert "of 100 captions, 10.0% are longer than text_len 4 and cut (text_len 7 would hold 99%)" in said
    with pytest.raises(ValueError, match="11.0% are longer .*bad_captions is 0.1: set --bad_captions=1 to train anyway"):
        tokenizer.survey(good[1:] + long + long[:1], bpe, 4, 0.1)
    with pytest.raises(ValueError, match="10.0% have too many words.*`python data.py vocab .*bad_captions is 0.05"):
        tokenizer.survey(good + odd, bpe, 8, 0.05)
    assert "\n" not in tokenizer.survey(odd, bpe, 2, 1.0) and bpe.cut == 0
