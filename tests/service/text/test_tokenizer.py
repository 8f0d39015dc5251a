"""Reading tokenizers from model directories: the same ids as transformers, and errors that say what to do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_service.text import TextError, Tokenizer, TokenizerError

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = REPOSITORY / ".." / "shared" / "data" / "tokenizers"
DEMO = REPOSITORY / "demo/loraplex_demo/models"
# The bare SentencePiece model has an oracle of its own (test_text_sentencepiece.py): without a configuration
# transformers forgets the leading space and joins pieces in another order than SentencePiece itself.
WITH_ORACLE = sorted(path for path in SHARED.glob("*") if path.name != "llama2_sentencepiece") + sorted(
    path.parent for path in DEMO.glob("*/tokenizer.json")
)
TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "a  b\n\n\tc\r\n",
    "naïve café – 東京 🇫🇷 👩‍👩‍👧 𝔘𝔫𝔦",
    "e\u0301 decomposed, \ufb01 ligature, \u200b zero width",
    "<s>a</s> b<|endoftext|>c <|im_start|>user\nhi<|im_end|>\n<tool_call> x</tool_call>",
    "0123456789 1,000.50 don't we'LL",
    "def f(x):\n    return {'a': x**2}  # ▁ and Ġ",
    "\x00\x01\x7f",
]


def write(directory: Path, **files: object) -> Path:
    """A model directory with these files: `.json` is added to the names, values are JSON or text."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return directory


def word_level(*words: str, added: tuple[str, ...] = (), **fields: object) -> dict[str, object]:
    """A tokenizer.json whose tokens are whole words."""
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(words) + i, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, token in enumerate(added)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[0]},
        **fields,
    }


@pytest.fixture(scope="module", params=WITH_ORACLE, ids=lambda path: path.name)
def pair(request):
    """Our tokenizer and that of transformers, of one directory."""
    transformers = pytest.importorskip("transformers")
    return Tokenizer.load(request.param), transformers.AutoTokenizer.from_pretrained(request.param)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_equal_transformers(pair, add_special_tokens):
    ours, theirs = pair
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens) == theirs.encode(text, add_special_tokens=add_special_tokens), text


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_ids_of_any_text_equal_transformers(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("skip", [True, False])
def test_text_of_encoded_texts_equals_transformers(pair, skip):
    ours, theirs = pair
    for text in TEXTS:
        token_ids = theirs.encode(text)
        assert ours.decode(token_ids, skip) == theirs.decode(token_ids, skip_special_tokens=skip), text


def spaced(pre_tokenizer: object, normalizer: object = None) -> dict[str, object]:
    """A tokenizer.json of letters, with both signs for a space, in which a text begins as these two say."""
    vocab = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "Ġ", *"abcdehlorstwHT"])}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"},
    }


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
METASPACE_RULE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
OLDEST_RULE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize(
    ("tokenizer_class", "backend"),
    [
        ("GPT2Tokenizer", spaced(BYTE_LEVEL)),
        ("GPT2TokenizerFast", spaced({**BYTE_LEVEL, "add_prefix_space": False})),
        ("GPTNeoXTokenizerFast", spaced(BYTE_LEVEL)),
        ("PreTrainedTokenizerFast", spaced(BYTE_LEVEL)),
        ("LlamaTokenizerFast", spaced(METASPACE_RULE)),
        ("LlamaTokenizer", spaced({**METASPACE_RULE, "prepend_scheme": "never"})),
        ("LlamaTokenizer", spaced(None, OLDEST_RULE)),
        ("LlamaTokenizerFast", spaced(BYTE_LEVEL)),
    ],
)
def test_the_space_before_a_text_is_that_of_transformers(tmp_path, tokenizer_class, backend, prefix, legacy):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
    config |= {} if prefix is None else {"add_prefix_space": prefix}
    config |= {} if legacy is None else {"legacy": legacy}
    write(tmp_path, tokenizer=backend, tokenizer_config=config, config={"model_type": "llama"})
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cats", " the cats", "the</s>cats", "</s> the"):
        assert ours.encode(text) == theirs.encode(text), text


def test_mistrals_own_format_is_named(tmp_path):
    write(tmp_path, tekken={"vocab": []})
    with pytest.raises(TokenizerError, match=r"tekken\.json: is in Mistral's own format, .*Put the tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_where_no_space_is_put_none_is_taken_away(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_prefix_space": False}
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    write(tmp_path, tokenizer={**spaced(METASPACE_RULE), "decoder": decoder}, tokenizer_config=config)
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    token_ids = ours.encode(" the cats")
    assert ours.decode(token_ids) == theirs.decode(token_ids) == " the cats"


def test_vocabulary_equals_transformers(pair):
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert all(ours.token_to_id(token) == token_id for token, token_id in theirs.get_vocab().items())
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id is None or theirs.eos_token_id in ours.eos_token_ids
    assert ours.special_token_ids >= set(theirs.all_special_ids)


def test_offsets_equal_transformers(pair):
    ours, theirs = pair
    for text in TEXTS:
        expected = theirs(text, return_offsets_mapping=True)
        encoding = ours.encode_with_offsets(text)
        assert (encoding.token_ids, encoding.offsets) == (expected["input_ids"], expected["offset_mapping"])


def test_loading_takes_neither_torch_nor_transformers():
    code = "import sys, loraplex_service.text; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- what the small files say --------------------------------------------------------------------------------------


def test_eos_ids_join_the_tokenizer_and_the_generation_config(tmp_path):
    directory = write(
        tmp_path,
        tokenizer=word_level("?", "a", added=("<end>", "<turn>")),
        tokenizer_config={"eos_token": {"__type": "AddedToken", "content": "<end>"}},
        generation_config={"eos_token_id": [3, 2]},
        config={"eos_token_id": 1},
    )
    assert Tokenizer.load(directory).eos_token_ids == (2, 3)


def test_eos_ids_of_config_count_where_generation_config_has_none(tmp_path):
    config = {"text_config": {"eos_token_id": 1, "bos_token_id": 0}}
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?", "a"), config=config, generation_config={}))
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((1,), 0)


def test_truncation_and_padding_left_by_training_are_ignored(tmp_path):
    limits: dict[str, Any] = {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 5},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "?",
        },
    }
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?", "a", "b", **limits)))
    assert (tokenizer.encode("a b a b"), tokenizer.encode("a")) == ([1, 2, 1, 2], [1])


def test_tokens_that_only_the_configuration_lists_are_added_under_their_ids(tmp_path):
    added = {"2": {"content": "<x>", "special": True}, "3": {"content": "<y>", "special": False}}
    config = {"added_tokens_decoder": added}
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?", "a"), tokenizer_config=config))
    assert tokenizer.encode("a<y>a<x>") == [1, 3, 1, 2]
    assert tokenizer.decode([1, 3, 2]) == "a <y>"


def test_older_files_count_only_where_the_configuration_lists_no_added_tokens(tmp_path):
    older = {"special_tokens_map": {"eos_token": "b"}, "tokenizer": word_level("?", "a", "b")}
    config: dict[str, object] = {"eos_token": "a"}
    assert Tokenizer.load(write(tmp_path / "old", **older, tokenizer_config=config)).eos_token_ids == (2,)
    config["added_tokens_decoder"] = {}
    assert Tokenizer.load(write(tmp_path / "new", **older, tokenizer_config=config)).eos_token_ids == (1,)


def test_special_token_outside_the_vocabulary_gets_no_id(tmp_path):
    config = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?", "a"), tokenizer_config=config))
    assert (tokenizer.vocab_size, tokenizer.token_to_id("<pad>"), tokenizer.eos_token_ids) == (2, None, ())


def test_split_special_tokens_reads_them_as_plain_text(tmp_path):
    config = {"split_special_tokens": True}
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?", "a", added=("<x>",)), tokenizer_config=config))
    assert tokenizer.encode("a <x>") == [1, 0]


def test_byte_level_files_without_tokenizer_json_equal_the_one_with_it(tmp_path):
    source = SHARED / "gpt2_bpe"
    if not source.is_dir():
        pytest.skip("needs the shared tokenizers")
    for name in ("vocab.json", "merges.txt", "config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    old, new = Tokenizer.load(tmp_path), Tokenizer.load(source)
    assert [old.encode(text) for text in TEXTS] == [new.encode(text) for text in TEXTS]
    assert (old.bos_token_id, old.eos_token_ids) == (new.bos_token_id, new.eos_token_ids) == (50256, (50256,))


def test_bos_and_eos_are_added_where_the_configuration_asks(tmp_path):
    vocab = {"a": 0, "b": 1, "<s>": 2, "</s>": 3}
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    flags = {"add_bos_token": True, "add_eos_token": True}
    directory = write(tmp_path, vocab=vocab, tokenizer_config={**config, **flags})
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("ab") == [2, 0, 1, 3]
    assert tokenizer.encode("ab", add_special_tokens=False) == [0, 1]


# ---- chat templates ------------------------------------------------------------------------------------------------


def test_template_files_replace_the_template_of_the_configuration(tmp_path):
    directory = write(tmp_path, tokenizer=word_level("?"), tokenizer_config={"chat_template": "old"})
    (directory / "chat_template.jinja").write_text("new")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("with documents")
    template = Tokenizer.load(directory).chat_template
    assert template is not None
    assert template.sources == {"default": "new", "rag": "with documents"}


def test_named_templates_and_special_tokens_reach_the_chat_template(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>"}, "image_token": "<image>", "eos_token": None}
    template = Tokenizer.load(write(tmp_path, tokenizer=word_level("?"), tokenizer_config=config)).chat_template
    assert template is not None
    assert template.sources == {"default": "d", "tool_use": "t"}
    assert template.special_tokens == {"bos_token": "<s>", "image_token": "<image>"}


def test_model_without_a_template_has_none_and_knows_its_special_tokens(tmp_path):
    config = {"bos_token": "<s>", "eos_token": None}
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?"), tokenizer_config=config))
    assert tokenizer.chat_template is None
    assert tokenizer.special_tokens == {"bos_token": "<s>"}


def test_null_says_that_there_is_no_bos(tmp_path):
    files = {"tokenizer": word_level("?"), "config": {"bos_token_id": 0}}
    assert Tokenizer.load(write(tmp_path / "absent", **files)).bos_token_id == 0
    assert Tokenizer.load(write(tmp_path / "null", **files, tokenizer_config={"bos_token": None})).bos_token_id is None


# ---- single tokens -------------------------------------------------------------------------------------------------


def test_token_text_shows_what_one_token_adds():
    if not (SHARED / "gpt2_bpe").is_dir():
        pytest.skip("needs the shared tokenizers")
    tokenizer = Tokenizer.load(SHARED / "gpt2_bpe")
    half = tokenizer.encode("東")[0]
    assert tokenizer.token_text(tokenizer.encode(" world")[0]) == " world"
    assert tokenizer.token_bytes(half) == "東".encode()[: len(tokenizer.token_bytes(half))]
    assert tokenizer.token_text(half) == "\ufffd"
    assert tokenizer.token_text(50256) == "<|endoftext|>"


def test_id_beyond_the_vocabulary_has_no_text(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?", "a", "b")))
    assert tokenizer.id_to_token(77) is None
    assert tokenizer.decode([1, 77, 2]) == "a b"


@pytest.mark.parametrize("token_id", [-1, 1 << 32])
def test_what_is_no_id_is_refused(tmp_path, token_id):
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?")))
    with pytest.raises(TextError, match=f"token id {token_id}"):
        tokenizer.decode([token_id])


def test_half_a_surrogate_pair_is_refused(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=word_level("?")))
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(TextError, match="character 2"):
            encode("ab\ud83d")


# ---- files that cannot be read -------------------------------------------------------------------------------------


def test_missing_directory(tmp_path):
    with pytest.raises(TokenizerError, match="is no directory"):
        Tokenizer.load(tmp_path / "absent")


def test_directory_without_a_tokenizer_names_what_it_has(tmp_path):
    with pytest.raises(TokenizerError, match=r"found: tokenizer_config.json.*Put tokenizer.json there"):
        Tokenizer.load(write(tmp_path, tokenizer_config={}, config={}))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', "null", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer_json(tmp_path, content):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.load(write(tmp_path, tokenizer=content))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": ', '"text"', "[" * 100_000])
def test_broken_configuration(tmp_path, content):
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: "):
        Tokenizer.load(write(tmp_path, tokenizer=word_level("?"), tokenizer_config=content))


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config"])
def test_git_lfs_pointer_says_how_to_get_the_file(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    with pytest.raises(TokenizerError, match="git lfs pull"):
        Tokenizer.load(write(tmp_path, **{"tokenizer": word_level("?"), name: pointer}))


def test_configuration_that_is_no_utf8(tmp_path):
    directory = write(tmp_path, tokenizer=word_level("?"))
    (directory / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(TokenizerError, match="no UTF-8"):
        Tokenizer.load(directory)


def test_sentencepiece_file_that_is_none(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: is no SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_byte_level_files_of_an_unknown_class_are_refused(tmp_path):
    directory = write(tmp_path, vocab={"a": 0}, tokenizer_config={"tokenizer_class": "MyTokenizer"})
    (directory / "merges.txt").write_text("")
    with pytest.raises(TokenizerError, match="MyTokenizer"):
        Tokenizer.load(directory)


def test_added_token_with_an_impossible_id_is_refused(tmp_path):
    config = {"added_tokens_decoder": {"9": {"content": "<x>"}}}
    with pytest.raises(TokenizerError, match=r"'<x>' the id 9, but the vocabulary leads to 1"):
        Tokenizer.load(write(tmp_path, tokenizer=word_level("?"), tokenizer_config=config))


@pytest.mark.parametrize("value", ["2", [1, None], -1, True, [[1]], {}])
def test_eos_id_that_is_no_id(tmp_path, value):
    with pytest.raises(TokenizerError, match="eos_token_id"):
        Tokenizer.load(write(tmp_path, tokenizer=word_level("?"), config={"eos_token_id": value}))


@pytest.mark.parametrize("value", [3, [{"name": "default"}], ["text"]])
def test_malformed_chat_template(tmp_path, value):
    with pytest.raises(TokenizerError, match="chat_template must be"):
        Tokenizer.load(write(tmp_path, tokenizer=word_level("?"), tokenizer_config={"chat_template": value}))


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "a"}, "content": ""}],
        },
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 2, "stop": 0}]},
    ],
)
def test_decoder_that_cannot_be_streamed_is_refused(tmp_path, decoder):
    with pytest.raises(TokenizerError, match="decoder"):
        Tokenizer.load(write(tmp_path, tokenizer=word_level("?", decoder=decoder)))
