"""A bare tokenizer.model gives what the sentencepiece library gives: Llama's own and some trained here."""

import io
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_service.text import Tokenizer, TokenizerError

sentencepiece = pytest.importorskip("sentencepiece")
LLAMA = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "tokenizers" / "llama2_sentencepiece"

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore, she said",
    "ein Igel, zwei Igel: naïve cafés und Häuser",
    "numbers 0 1 2 3 42 1000 and 3.14159",
    "東京は日本の首都です",
]
TRAINED = {
    "bpe bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400, "normalization_rule_name": "identity"},
    "bpe nmt": {"model_type": "bpe", "vocab_size": 130},
    "unigram": {"model_type": "unigram", "vocab_size": 68},
    "unigram no prefix": {"model_type": "unigram", "vocab_size": 66, "add_dummy_prefix": False},
    "bpe spaces": {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<turn>", "\n\n", "▁▁▁", "▁▁"],
    },
}


def train(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, minloglevel=3, num_threads=1, **options
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["llama", *TRAINED])
def pair(request, tmp_path_factory):
    """Ours and the sentencepiece library, of one model."""
    if request.param == "llama" and not LLAMA.is_dir():
        pytest.skip("needs the shared tokenizers")
    directory = LLAMA if request.param == "llama" else tmp_path_factory.mktemp("model")
    if request.param != "llama":
        (directory / "tokenizer.model").write_bytes(train(**TRAINED[request.param]))
    return Tokenizer.load(directory), sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))


words = st.lists(st.sampled_from([*" ".join(SENTENCES).split(), "<turn>", "", "\n\n"]), max_size=8).map(" ".join)
texts = st.one_of(words, st.text("abcdehiors tné東 ", max_size=30), st.text(max_size=15))


@settings(deadline=None, max_examples=100)
@given(text=texts)
def test_ids_equal_sentencepiece(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)


@settings(deadline=None, max_examples=100)
@given(text=texts)
def test_text_of_ids_equals_sentencepiece(pair, text):
    ours, theirs = pair
    token_ids = theirs.encode(text)
    if theirs.unk_id() not in token_ids:
        assert ours.decode(token_ids) == theirs.decode(token_ids)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_text_of_any_tokens_equals_sentencepiece(pair, data):
    """Bytes that are no UTF-8 too. Models that remove extra spaces may begin no text with any: left out here."""
    ours, theirs = pair
    anywhere = st.integers(0, theirs.get_piece_size() - 1)
    token_ids = data.draw(st.lists(anywhere | st.integers(0, 300).filter(lambda i: i < theirs.get_piece_size())))
    token_ids = [i for i in token_ids if not theirs.is_control(i) and not theirs.is_unknown(i)]
    assert ours.decode(token_ids).lstrip(" ") == theirs.decode(token_ids).lstrip(" ")


def test_control_pieces_are_special_and_end_the_text(pair):
    ours, theirs = pair
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_id(), (theirs.eos_id(),))
    assert ours.decode([theirs.bos_id(), *theirs.encode("the"), theirs.eos_id()]) == "the"


def test_word_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="word", vocab_size=30))
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: holds a WORD or CHAR model"):
        Tokenizer.load(tmp_path)


def test_spaces_as_suffixes_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="bpe", vocab_size=130, treat_whitespace_as_suffix=True))
    with pytest.raises(TokenizerError, match="suffixes"):
        Tokenizer.load(tmp_path)


def test_a_piece_of_spaces_is_found_in_the_text(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(**TRAINED["bpe spaces"]))
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    found = Tokenizer.load(tmp_path).encode("the   fox  jumps")
    assert {theirs.piece_to_id("▁▁▁"), theirs.piece_to_id("▁▁")} <= set(found)
    assert found == theirs.encode("the   fox  jumps")


def test_a_piece_longer_than_any_vocabulary_has_is_refused(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = cast(Any, sentencepiece_model_pb2).ModelProto.FromString(train(**TRAINED["bpe bytes"]))
    proto.pieces.add(piece="a" * 1025, score=-1.0)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: holds a piece of 1025 characters: at most 1024"):
        Tokenizer.load(tmp_path)
