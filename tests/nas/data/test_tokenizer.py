import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moesaic.nas.data.tokenizer import END_OF_TEXT, train_tokenizer

SENTENCES = [
    "It's 1984, and the clocks – all 13 – strike. ",
    "naïve café 東京 🦊\n\n",
    "def f(x):\n    return x  # ---\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SENTENCES * 20, 400)


@given(st.text(max_size=200) | st.text("a \n-", min_size=200, max_size=2000))
def test_ids_are_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_long_word_is_cut_and_a_usual_one_is_not(tokenizer):
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("one " + "x" * 1000 + " two-" + "y" * 200 + "\n" + "€" * 200)
    words = [word for word, _ in pieces]
    assert words[0] == "one"
    assert {"Ġtwo", "-", "y" * 200} <= set(words)
    assert max(map(len, words)) == 256


def test_usual_text_is_encoded_as_without_the_limit(tokenizer):
    from tokenizers import pre_tokenizers

    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "".join(random.Random(0).choices(SENTENCES, k=100))
    assert plain.encode(text).ids == tokenizer.encode(text).ids


def test_training_on_one_word_takes_no_longer_than_on_many():
    """Merging was quadratic in the length of a word: this took minutes."""
    text = "".join(random.Random(0).choices("ACGT", k=400_000))
    tokenizer = train_tokenizer([text], 512)
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
