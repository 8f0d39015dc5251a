"""Streaming text out of token ids: any split of the tokens gives the text of the whole."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from loraplex_service.text import IncrementalDetokenizer, Tokenizer
from loraplex_service.text.token_decoders import BYTE_ALPHABET, ByteLevelDecoder, decode_utf8

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = REPOSITORY / ".." / "shared" / "data" / "tokenizers"
DIRECTORIES = [
    *sorted(SHARED.glob("*")),
    *sorted(path.parent for path in REPOSITORY.glob("demo/loraplex_demo/models/*/tokenizer.json")),
]

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
GEMMA_DECODER = {"type": "Sequence", "decoders": LLAMA_DECODER["decoders"][:3]}
SENTENCEPIECE_TOKENS = [*BYTE_TOKENS, "▁", "▁▁", "a", "▁a", "é", "▁東", "\ufffd", " "]
BYTE_LEVEL_TOKENS = [*BYTE_ALPHABET, "ĠâĤ¬", "ðŁĺ", "ĢðŁ", "ï¿½", "aa", ""]
# Every kind of decoder, over a vocabulary with many ways to break a character.
SYNTHETIC = {
    "byte level": ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}, BYTE_LEVEL_TOKENS),
    "llama": (LLAMA_DECODER, SENTENCEPIECE_TOKENS),
    "gemma": (GEMMA_DECODER, SENTENCEPIECE_TOKENS),
    "metaspace": (
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        SENTENCEPIECE_TOKENS,
    ),
    "metaspace never": (
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
        SENTENCEPIECE_TOKENS,
    ),
    "words": (None, ["a", "bc", "é"]),
}


@pytest.fixture(scope="module", params=SYNTHETIC)
def synthetic(request, tmp_path_factory):
    """Ours and that of the tokenizers library, of one made-up tokenizer.json with two special tokens."""
    decoder, tokens = SYNTHETIC[request.param]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    file = {
        "version": "1.0",
        "added_tokens": [
            {"id": len(tokens), "content": "<s>", "special": True} | flags,
            {"id": len(tokens) + 1, "content": "<|héé▁|>", "special": True} | flags,
            {"id": len(tokens) + 2, "content": "<tool 東▁>", "special": False} | flags,
        ],
        "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "a"},
    }
    directory = tmp_path_factory.mktemp("synthetic")
    (directory / "tokenizer.json").write_text(json.dumps(file))
    return Tokenizer.load(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module", params=DIRECTORIES, ids=lambda path: path.name)
def real(request):
    return Tokenizer.load(request.param)


def streamed(tokenizer, token_ids, cuts=(), prompt=(), skip=True):
    """The text of some tokens, pushed in parts."""
    detokenizer = IncrementalDetokenizer(tokenizer.pieces(skip), prompt)
    places = sorted({place % (len(token_ids) + 1) for place in cuts})
    parts = zip([0, *places], [*places, len(token_ids)], strict=True)
    return "".join(detokenizer.push(token_ids[start:end]) for start, end in parts) + detokenizer.flush()


def ids_of(tokenizer):
    """Any tokens, with the last few, which are the odd ones of the synthetic vocabularies, more often."""
    last = tokenizer.vocab_size - 1
    return st.lists(st.integers(0, last) | st.integers(max(0, last - 10), last), max_size=12)


cuts_of = st.lists(st.integers(0, 40), max_size=8)


# ---- any tokens at all ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data(), cuts=cuts_of, skip=st.booleans())
def test_any_split_of_any_tokens_gives_the_whole_text(synthetic, data, cuts, skip):
    ours, _ = synthetic
    token_ids = data.draw(ids_of(ours))
    assert streamed(ours, token_ids, cuts, skip=skip) == ours.decode(token_ids, skip)


@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_tokens_have_the_text_that_the_tokenizers_library_gives(synthetic, data, skip):
    """But for byte tokens that are partly no UTF-8, where the library throws away the valid part as well."""
    ours, theirs = synthetic
    token_ids = data.draw(ids_of(ours))
    if theirs.decoder is not None and "ByteFallback" in str(theirs.decoder):
        assume(all(settled(run) for run in byte_runs(ours, token_ids, skip)))
    assert ours.decode(token_ids, skip) == theirs.decode(token_ids, skip_special_tokens=skip)


def byte_runs(tokenizer, token_ids, skip):
    """The bytes of byte tokens that stand next to each other."""
    runs = [bytearray()]
    for token_id in token_ids:
        token = tokenizer.id_to_token(token_id)
        if token in BYTE_TOKENS:
            runs[-1].append(BYTE_TOKENS.index(token))
        elif not (skip and token_id in tokenizer.special_token_ids):
            runs.append(bytearray())
    return [bytes(run) for run in runs]


def settled(run):
    """Whether a run is all text or nothing but U+FFFD."""
    text, rest = decode_utf8(run, replaces_each_byte=True)
    return (not rest and "\ufffd" not in text) or set(text) <= {"\ufffd"}


@settings(deadline=None, max_examples=60)
@given(data=st.data(), cuts=cuts_of, skip=st.booleans())
def test_any_split_of_any_tokens_of_real_tokenizers(real, data, cuts, skip):
    token_ids = data.draw(ids_of(real))
    assert streamed(real, token_ids, cuts, skip=skip) == real.decode(token_ids, skip)


@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_at_most_one_character_is_held_back(synthetic, data, skip):
    ours, _ = synthetic
    detokenizer = IncrementalDetokenizer(ours.pieces(skip))
    token_ids = data.draw(ids_of(ours))
    pushed = "".join(detokenizer.push([token_id]) for token_id in token_ids)
    held = detokenizer.flush()
    assert held in {"", "\ufffd", "\ufffd" * 2, "\ufffd" * 3}
    assert pushed == ours.decode(token_ids, skip).removesuffix(held)


# ---- after a prompt ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data(), text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20))
def test_prompt_and_output_together_are_the_text(real, data, text):
    """Wherever a text is cut into prompt and output, even inside a character."""
    token_ids = real.encode(text)
    place = data.draw(st.integers(0, len(token_ids)))
    prompt, output = token_ids[:place], token_ids[place:]
    whole = real.decode(token_ids)
    assume("\ufffd" not in whole)  # a vocabulary that lacks some bytes cannot write every text
    said = real.decode(prompt).rstrip("\ufffd")
    assert streamed(real, output, data.draw(cuts_of), prompt) == whole[len(said) :]


@settings(deadline=None)
@given(data=st.data(), cuts=cuts_of, skip=st.booleans())
def test_output_after_any_prompt_is_the_rest_of_the_whole(synthetic, data, cuts, skip):
    ours, _ = synthetic
    prompt, output = data.draw(ids_of(ours)), data.draw(ids_of(ours))
    detokenizer = IncrementalDetokenizer(ours.pieces(skip))
    said = detokenizer.push(prompt)
    given_up = detokenizer.flush()
    whole = ours.decode(prompt + output, skip)
    text = streamed(ours, output, cuts, prompt, skip)
    assert whole in {said + text, said + given_up + text}


def test_output_keeps_its_leading_space_after_a_prompt(tmp_path):
    tokenizer = llama(tmp_path)
    output = [SENTENCEPIECE_TOKENS.index("▁a")]
    assert streamed(tokenizer, output) == "a"
    assert streamed(tokenizer, output, prompt=[SENTENCEPIECE_TOKENS.index("a")]) == " a"


def test_special_tokens_do_not_begin_a_text_unless_they_show(tmp_path):
    tokenizer = llama(tmp_path)
    bos, output = tokenizer.token_to_id("<s>"), [SENTENCEPIECE_TOKENS.index("▁a")]
    assert streamed(tokenizer, output, prompt=[bos]) == "a"
    assert streamed(tokenizer, output, prompt=[bos], skip=False) == " a"


def test_character_begun_by_the_prompt_belongs_to_the_output(tmp_path):
    tokenizer = llama(tmp_path)
    first, second, third = "東".encode()
    assert streamed(tokenizer, [third], prompt=[first, second]) == "東"
    assert streamed(tokenizer, [second, third], prompt=[65, first]) == "東"


def test_character_begun_by_the_prompt_and_dropped_there_is_not_repeated(tmp_path):
    tokenizer = llama(tmp_path)
    assert streamed(tokenizer, [SENTENCEPIECE_TOKENS.index("a")], prompt=["東".encode()[0]]) == "a"
    assert streamed(tokenizer, list("é".encode()), prompt=["東".encode()[0]]) == "é"
    assert streamed(tokenizer, [], prompt=["東".encode()[0]]) == ""


def test_replacement_character_completed_after_the_prompt_is_a_character(tmp_path):
    first, second, third = "\ufffd".encode()
    assert streamed(llama(tmp_path), [third], prompt=[first, second]) == "\ufffd"


# ---- what is no text -----------------------------------------------------------------------------------------------


def test_a_genuine_replacement_character_is_not_held_back(tmp_path):
    detokenizer = IncrementalDetokenizer(llama(tmp_path).pieces(skip_special_tokens=True))
    assert detokenizer.push([SENTENCEPIECE_TOKENS.index("\ufffd")]) == "\ufffd"


def test_token_without_bytes_is_no_text_that_would_break_a_character():
    assert ByteLevelDecoder().piece("") == b""


def test_endless_invalid_bytes_come_out_as_they_come(tmp_path):
    detokenizer = IncrementalDetokenizer(llama(tmp_path).pieces(skip_special_tokens=True))
    assert [detokenizer.push([0x80]) for _ in range(5)] == ["\ufffd"] * 5


def test_unfinished_character_at_the_end_is_replaced(tmp_path):
    detokenizer = IncrementalDetokenizer(llama(tmp_path).pieces(skip_special_tokens=True))
    assert detokenizer.push(list("é".encode())[:1]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_why_not_decode_stream(tmp_path):
    """DecodeStream keeps a genuine U+FFFD back for ever, and fails on bytes that are no UTF-8."""
    llama(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert DecodeStream(skip_special_tokens=True).step(theirs, SENTENCEPIECE_TOKENS.index("\ufffd")) is None
    stream = DecodeStream(skip_special_tokens=True)
    for token_id in [0xC3, 0xA9, 0xC3]:  # é, and the beginning of another
        stream.step(theirs, token_id)
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(theirs, SENTENCEPIECE_TOKENS.index("a"))


def llama(directory: Path) -> Tokenizer:
    """Ids 0 to 255 are the bytes."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    file = {
        "version": "1.0",
        "added_tokens": [{"id": len(SENTENCEPIECE_TOKENS), "content": "<s>", "special": True} | flags],
        "decoder": LLAMA_DECODER,
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate(SENTENCEPIECE_TOKENS)},
            "unk_token": "a",
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(file))
    return Tokenizer.load(directory)
