"""The tokenizer in a GGUF file gives the ids of the one that it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from loraplex_service.text import Tokenizer, TokenizerError
from loraplex_service.text.gguf_tokenizer import CUTS, MAX_TOKENS, read_text, read_vocabulary
from tests.gguf_files import finish, gguf
from tests.service.text.test_sentencepiece import TRAINED, sentencepiece, texts, train

CONTROL, USER_DEFINED = 3, 4
TEXTS = [
    "It's 2024, don't WE'LL pay 1234567 or 3.14?\n\n  Well...\r\n",
    "naïve cafés, 東京は日本の首都です。 \t tabs\u00a0",
    "def f(x):\n    return x  # été\n",
    "camelCaseWords HTTPServer's",
]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def splits(*patterns: str) -> Any:
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(each), "isolated") for each in patterns), BYTES])


# As the models' own tokenizer.json has them.
OWN: Mapping[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": splits(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": splits(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": splits(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@pytest.fixture(scope="module", params=OWN)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Library]:
    """Ours, from a file, and the library's that it was written from."""
    library = Library(models.BPE(ignore_merges=CUTS[request.param].whole_words))
    library.normalizer = normalizers.NFC() if request.param == "qwen2" else None
    library.pre_tokenizer, library.decoder = OWN[request.param], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    library.train_from_iterator(TEXTS * 5, trainer)
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_bpe(path, library, request.param)
    return Tokenizer.load(path), library


def write_bpe(path: Path, library: Library, pre: str, **more: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary = [token for token, _ in sorted(library.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    special = {token.content for token in library.get_added_tokens_decoder().values()}
    writer.add_token_types([CONTROL if token in special else 1 for token in vocabulary])
    merges = json.loads(library.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    for key, value in more.items():
        getattr(writer, key)(value)
    finish(writer)


@settings(deadline=None, max_examples=60)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text("abC's 123é東\n\t!/", max_size=30), st.text(max_size=15)))
def test_ids_equal_those_of_the_library(pair: tuple[Tokenizer, Library], text: str) -> None:
    ours, library = pair
    assert ours.encode(text) == library.encode(text).ids
    assert ours.decode(ours.encode(text)) == library.decode(library.encode(text).ids)


def write_pieces(path: Path, model: bytes, **flags: bool) -> None:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    kinds = {"is_unknown": 2, "is_control": CONTROL, "is_unused": 5, "is_byte": 6}
    ids = range(processor.GetPieceSize())
    types = [next((kind for name, kind in kinds.items() if getattr(processor, name)(each)), 1) for each in ids]
    tokens = [processor.IdToPiece(each) for each in ids]
    types = [
        USER_DEFINED if token in ("<turn>", "\n\n", "▁▁▁", "▁▁") else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([processor.GetScore(each) for each in ids])
    writer.add_token_types(types)
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(flags["prefix"])
    writer.add_remove_extra_whitespaces(flags["squeezes"])
    finish(writer)


@pytest.fixture(scope="module", params=["bpe bytes", "bpe spaces"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    model, path = train(**TRAINED[request.param]), tmp_path_factory.mktemp("model") / "model.gguf"
    plain = request.param == "bpe bytes"
    write_pieces(path, model, prefix=plain, squeezes=plain)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return Tokenizer.load(path), processor


@settings(deadline=None, max_examples=60)
@given(text=texts)
def test_ids_equal_sentencepiece(pieces: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pieces
    assert ours.encode(text) == theirs.encode(text)


@pytest.fixture(scope="module")
def library() -> Library:
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<turn>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def test_ends_template_and_defaults_come_from_the_file(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    sampling = {"add_sampling_temp": 0.25, "add_sampling_top_k": 7}
    write_bpe(path, library, "gpt-2", add_eot_token_id=2, add_chat_template="{{ messages[0].content }}", **sampling)
    ours = Tokenizer.load(path)
    assert ours.bos_token_id == 0
    assert ours.eos_token_ids == (1, 2)
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert ours.chat_template is not None
    assert ours.generation_config["temperature"] == 0.25
    assert ours.generation_config["top_k"] == 7


def test_the_file_or_else_the_kind_says_whether_a_text_begins_with_bos(library: Library, tmp_path: Path) -> None:
    write_bpe(tmp_path / "llama.gguf", library, "llama-bpe")
    write_bpe(tmp_path / "gpt.gguf", library, "gpt-2", add_add_bos_token=True)
    assert Tokenizer.load(tmp_path / "llama.gguf").num_in_front == 0
    assert Tokenizer.load(tmp_path / "gpt.gguf").num_in_front == 1


def test_an_unknown_way_to_cut_is_refused_by_name(library: Library, tmp_path: Path) -> None:
    write_bpe(tmp_path / "model.gguf", library, "default")
    with pytest.raises(TokenizerError, match=r"model\.gguf: tokenizer\.ggml\.pre is 'default'"):
        Tokenizer.load(tmp_path / "model.gguf")


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a"])
    finish(writer)
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.model is 'bert'"):
        Tokenizer.load(tmp_path / "model.gguf")


@pytest.mark.parametrize("tokens", [["a" * 12_000], ["a"] * (MAX_TOKENS + 1)], ids=["long", "many"])
def test_tokens_beyond_all_bounds_are_refused(tokens: list[str]) -> None:
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.tokens has more than"):
        read_text(metadata)


def test_another_template_brings_its_own_way_of_calling_tools(library: Library, tmp_path: Path) -> None:
    write_bpe(tmp_path / "model.gguf", library, "gpt-2", add_chat_template="{{ messages[0].content }}")
    ours = Tokenizer.load(tmp_path / "model.gguf")
    assert ours.message_syntax is None
    ours.use_chat_template("<|im_start|>{{ tools }}<tool_call>")
    assert ours.message_syntax is not None
    assert ours.message_syntax.calls is not None


def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    finish(writer)
    with pytest.raises(TokenizerError, match="has no vocabulary"):
        Tokenizer.load(tmp_path / "model.gguf")


PHI3 = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "<|endoftext|>", "<|end|>", "b", "▁"],
    "tokenizer.ggml.token_type": [2, *[CONTROL] * 3, 1, 1],
    "tokenizer.ggml.add_space_prefix": False,
}


@pytest.mark.parametrize(
    ("architecture", "token", "found"),
    [
        ("phi3", "<|end|>", [3, 4]),
        ("phi3", "<|endoftext|>", [2, 5, 4]),
        ("llama", "<|end|>", [3, 5, 4]),
    ],
)
def test_spaces_behind_phi3s_own_tokens_belong_to_them(architecture: str, token: str, found: list[int]) -> None:
    tokenizer = read_vocabulary(PHI3 | {"general.architecture": architecture})
    assert tokenizer.encode(f"{token} b").ids == found


def test_an_id_of_no_token_is_refused_with_the_file(library: Library, tmp_path: Path) -> None:
    write_bpe(tmp_path / "model.gguf", library, "gpt-2", add_eot_token_id=70_000)
    with pytest.raises(TokenizerError, match=r"model\.gguf: tokenizer\.ggml\.eot_token_id is 70000"):
        Tokenizer.load(tmp_path / "model.gguf")
