"""Captions to ids: byte pairs, vocabularies from files, and captions that are numbers of classes."""
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
    with pytest.raises(ValueError, match="11.0% are longer .*bad_captions is 0.1: --bad_captions=1 trains all the same"):
        tokenizer.survey(good[1:] + long + long[:1], bpe, 4, 0.1)
    with pytest.raises(ValueError, match="10.0% fall apart into bytes.*`python data.py vocab .*bad_captions is 0.05"):
        tokenizer.survey(good + odd, bpe, 8, 0.05)
    assert "\n" not in tokenizer.survey(odd, bpe, 2, 1.0) and bpe.cut == 0
