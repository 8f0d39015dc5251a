"""Adapters' own tokens against the tokenizers library, to whose copy of the base they are added."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from loraplex_service.text import TextError, Tokenizer, TokenizerError, TooManyTokensError, adapter_text
from loraplex_service.text.detokenizer import IncrementalDetokenizer
from loraplex_service.text.literal import LiteralEncoder

Write = Callable[..., Path]
NEW = [
    AddedToken("<think>", normalized=False),
    AddedToken("</think>", normalized=False, special=True),
    AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("word", single_word=True),
    AddedToken("<think>er"),
]


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with a few merges, an added token of its own, and BOS before every text."""
    directory = tmp_path_factory.mktemp("base")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {char: index for index, char in enumerate(sorted(alphabet))} | {"th": 256, "in": 257}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("t", "h"), ("i", "n")]))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<reserved>", special=True)])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<s>", "chat_template": "of the base"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def base(base_directory: Path) -> Tokenizer:
    return Tokenizer.load(base_directory)


@pytest.fixture(scope="module")
def with_tokens(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(base_directory / "tokenizer.json"))
    backend.add_tokens(NEW)
    return backend


@pytest.fixture(scope="module")
def adapted(base: Tokenizer, with_tokens: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("adapter")
    with_tokens.save(str(directory / "tokenizer.json"))
    text = adapter_text(directory, base)
    assert text.warnings == ()
    return text.tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files beside an adapter's weights: JSON for what is no text."""

    def write(**files: object) -> Path:
        for name, content in files.items():
            file = tmp_path / name.replace("__", ".")
            file.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
        return tmp_path

    return write


TEXTS = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<tool>",
            "word",
            "er",
            "<s>",
            " ",
            "\n",
            "th",
            "in",
            ".",
            "é",
            "e\u0301",
            "🦜",
            "x",
            "<",
        ]
    )
).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, special=st.booleans())
def test_tokens_and_offsets_are_those_of_the_library(
    adapted: Tokenizer, with_tokens: tokenizers.Tokenizer, text: str, special: bool
) -> None:
    expected = with_tokens.encode(text, add_special_tokens=special)
    assert adapted.encode(text, special) == expected.ids
    found = adapted.encode_with_offsets(text, special)
    assert (found.token_ids, found.offsets) == (expected.ids, expected.offsets)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, cut=st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_no_control_token_comes_of_a_literal_part(
    adapted: Tokenizer, with_tokens: tokenizers.Tokenizer, text: str, cut: tuple[int, int]
) -> None:
    start, end = sorted(min(place, len(text)) for place in cut)
    literal = [(start, end)] if start < end else []
    one_tokenizer = LiteralEncoder(with_tokens, ["of the base"])
    ids, offsets = one_tokenizer.encode(text, literal, lambda backend, text: backend.encode(text))
    found = adapted.encode_with_offsets(text, literal=literal)
    assert (found.token_ids, found.offsets) == (ids, offsets)
    assert adapted.encode(text, literal=literal) == ids


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_texts_are_written_as_they_were_read(adapted: Tokenizer, with_tokens: tokenizers.Tokenizer, text: str) -> None:
    token_ids = with_tokens.encode(text, add_special_tokens=False).ids
    detokenizer = IncrementalDetokenizer(adapted.pieces(skip_special_tokens=False))
    streamed = "".join(detokenizer.push((token_id,)) for token_id in token_ids) + detokenizer.flush()
    assert streamed == with_tokens.decode(token_ids, skip_special_tokens=False)
    assert adapted.decode(token_ids) == with_tokens.decode(token_ids)


def test_its_tokens_can_be_drawn_and_have_text(adapted: Tokenizer, base: Tokenizer) -> None:
    assert adapted.num_token_ids == base.num_token_ids + len(NEW)
    assert adapted.token_text(260) == "<think>"
    assert adapted.token_to_id("</think>") == 261
    assert 261 in adapted.special_token_ids


def test_the_longest_token_may_be_its_own(base: Tokenizer, adapted: Tokenizer, write: Write) -> None:
    assert adapted.least_tokens(1000) == 0  # <tool> takes all the space around it
    assert base.least_tokens(1000) > 0
    text = adapter_text(write(added_tokens__json={"<" * 100: 260}), base)
    assert text.tokenizer.least_tokens(1000) <= len(text.tokenizer.encode("<" * 1000, False)) == 10


def test_more_tokens_than_are_allowed_are_refused(adapted: Tokenizer) -> None:
    assert len(adapted.encode("a<think>a", False, most=3)) == 3
    with pytest.raises(TooManyTokensError):
        adapted.encode("a<think>a", True, most=3)


def test_half_a_surrogate_pair_is_refused(adapted: Tokenizer) -> None:
    with pytest.raises(TextError, match="half a surrogate pair at character 7"):
        adapted.encode("<think>\ud800")


def test_the_older_files_name_tokens_too(base: Tokenizer, write: Write) -> None:
    text = adapter_text(write(added_tokens__json={"<think>": 260}), base)
    assert text.tokenizer.encode("a<think>", False)[-1] == 260


def test_a_reserved_token_may_be_renamed(base: Tokenizer, write: Write) -> None:
    config = {"added_tokens_decoder": {"259": {"content": "<think>", "special": False}}}
    text = adapter_text(write(tokenizer_config__json=config), base)
    assert text.warnings == ()
    assert text.tokenizer.encode("<think>", False) == [259]
    assert text.tokenizer.decode([259]) == "<think>"


def test_an_id_that_the_base_has_given_away_is_warned_of(base: Tokenizer, write: Write) -> None:
    (warning,) = adapter_text(write(added_tokens__json={"<think>": 7}), base).warnings
    assert warning.startswith("'<think>': not added")


def test_the_template_and_the_end_are_its_own(base: Tokenizer, write: Write) -> None:
    config = {"chat_template": "its own", "eos_token": "<end>", "added_tokens_decoder": {"260": {"content": "<end>"}}}
    tokenizer = adapter_text(write(tokenizer_config__json=config), base).tokenizer
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.sources == {"default": "its own"}
    assert tokenizer.chat_template.special_tokens["eos_token"] == "<end>"
    assert tokenizer.eos_token_ids == (260, 258)


def test_a_template_of_a_file_comes_first_and_without_any_it_is_the_base_s(base: Tokenizer, write: Write) -> None:
    directory = write(tokenizer_config__json={"chat_template": "declared"}, chat_template__jinja="of a file")
    templates = adapter_text(directory, base).tokenizer.chat_template
    assert templates is not None
    assert templates.sources == {"default": "of a file"}
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text("{}")
    templates = adapter_text(directory, base).tokenizer.chat_template
    assert templates is not None
    assert templates.sources == {"default": "of the base"}


def test_another_vocabulary_is_warned_of_and_the_base_s_is_used(
    base: Tokenizer, base_directory: Path, write: Write
) -> None:
    rules = json.loads((base_directory / "tokenizer.json").read_text())
    del rules["model"]["vocab"]["in"]
    text = adapter_text(write(tokenizer__json={**rules, "normalizer": None}), base)
    (warning,) = text.warnings
    assert "its vocab, normalizer differ from those of the base model" in warning
    assert text.tokenizer.encode("thin") == base.encode("thin")


def test_other_spellings_of_the_same_rules_are_the_same(base: Tokenizer, base_directory: Path, write: Write) -> None:
    rules = json.loads((base_directory / "tokenizer.json").read_text())
    rules["model"]["merges"] = ["t h", "i n"]
    assert adapter_text(write(tokenizer__json=rules), base).warnings == ()


def test_switches_that_older_files_leave_out_are_the_same(base: Tokenizer, base_directory: Path, write: Write) -> None:
    rules = json.loads((base_directory / "tokenizer.json").read_text())
    del rules["pre_tokenizer"]["use_regex"]
    assert adapter_text(write(tokenizer__json=rules), base).warnings == ()


@pytest.fixture
def sentence_pieces(tmp_path: Path) -> tokenizers.Tokenizer:
    """▁ before the first word of a text alone."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    return backend


def test_text_behind_an_added_token_does_not_begin_anew(
    sentence_pieces: tokenizers.Tokenizer, tmp_path: Path, write: Write
) -> None:
    sentence_pieces.add_special_tokens(["<s>"])
    sentence_pieces.save(str(tmp_path / "tokenizer.json"))
    base = Tokenizer.load(tmp_path)
    adapted = adapter_text(write(added_tokens__json={"<think>": 4}), base).tokenizer
    sentence_pieces.add_tokens(["<think>"])
    for text in ("a<think>a", "<think>a a", "a<s>a<think> a", " <think>"):
        expected = sentence_pieces.encode(text)
        found = adapted.encode_with_offsets(text)
        assert (found.token_ids, found.offsets) == (expected.ids, expected.offsets), text
        assert adapted.encode(text) == expected.ids, text


def test_where_the_beginning_counts_and_nothing_can_stand_there_the_text_is_not_used(
    sentence_pieces: tokenizers.Tokenizer, tmp_path: Path, write: Write
) -> None:
    sentence_pieces.save(str(tmp_path / "tokenizer.json"))
    base = Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="the beginning of a text differently"):
        adapter_text(write(added_tokens__json={"<think>": 3}), base)
