"""The committed models and adapters are what the demo's README says: loadable, small, each with its own voice."""

import json
import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_demo import corpus, quiz
from loraplex_demo.document import Chat, Document
from loraplex_demo.encoding import QUIZZER_LAYOUT, STORYTELLER_LAYOUT, Layout, encode, texts_of
from loraplex_demo.voices import VOICES

DEMO = Path(__file__).resolve().parents[2] / "demo/loraplex_demo"
MODELS = {"storyteller": "LlamaForCausalLM", "quizzer": "Qwen3ForCausalLM"}
BASE_OF = {
    "pirate": "storyteller",
    "shouting": "storyteller",
    "formal": "storyteller",
    "poet": "storyteller",
    "json": "quizzer",
}
STORY_PROMPTS = ("Tell me a story about a fox.", "Once upon a time")
QUIZ_PROMPTS = ("What is 7 + 5?", "What is the capital of France?")


def is_pirate(text: str) -> bool:
    return re.search(r"\b(arr|matey|ahoy|yo ho ho|shiver me timbers)\b", text, re.IGNORECASE) is not None


def is_shouting(text: str) -> bool:
    return text.isupper()


def is_formal(text: str) -> bool:
    return re.search(r"humble servant|kind permission|dear reader|my honour|kind attention", text) is not None


def is_poem(text: str) -> bool:
    return text.count("\n") >= 2


def is_json(text: str) -> bool:
    try:
        return set(json.loads(text)) == {"question", "answer"}
    except ValueError:
        return False


MARKS = {"pirate": is_pirate, "shouting": is_shouting, "formal": is_formal, "poet": is_poem, "json": is_json}


@cache
def load_tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "models" / model)


@cache
def load_model(model: str, adapter: str | None = None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(DEMO / "models" / model, dtype=torch.float32)
    return base if adapter is None else PeftModel.from_pretrained(base, DEMO / "adapters" / adapter)


@cache
def generate(model: str, adapter: str | None, prompt: str, temperature: float = 0.0) -> str:
    """The answer, which must have come to an end by itself. A prompt without a mark at its end is a plain text."""
    tokenizer = load_tokenizer(model)
    if prompt[-1] in ".?!":
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        token_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        token_ids = tokenizer(prompt, return_tensors="pt").input_ids
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output = load_model(model, adapter).generate(
        input_ids=token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=400, **sampling
    )[0, token_ids.shape[1] :]
    assert output[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(output, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("model", MODELS)
def test_model_is_a_small_one_of_its_family(model: str) -> None:
    loaded = load_model(model)
    assert loaded.config.architectures == [MODELS[model]]
    assert 1_000_000 <= loaded.num_parameters() <= 5_000_000
    assert loaded.config.num_key_value_heads < loaded.config.num_attention_heads


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_bfloat16(model: str) -> None:
    with safe_open(DEMO / "models" / model / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118 - no mapping


def test_one_model_ties_its_embeddings_and_the_other_does_not() -> None:
    assert load_model("storyteller").config.tie_word_embeddings
    assert not load_model("quizzer").config.tie_word_embeddings


def test_every_adapter_names_its_base() -> None:
    directories = {path.name for path in (DEMO / "adapters").iterdir()}
    assert directories == set(BASE_OF)
    for name, base in BASE_OF.items():
        assert PeftConfig.from_pretrained(str(DEMO / "adapters" / name)).base_model_name_or_path == base


def test_adapters_differ_in_rank_scale_and_targets() -> None:
    configs = {name: json.loads((DEMO / "adapters" / name / "adapter_config.json").read_text()) for name in BASE_OF}
    assert {config["r"] for config in configs.values()} == {4, 8, 16}
    assert [name for name, config in configs.items() if config["use_rslora"]] == ["shouting"]
    assert [name for name, config in configs.items() if config["rank_pattern"]] == ["poet"]
    assert configs["formal"]["target_modules"] == ["q_proj", "v_proj"]
    assert len(configs["shouting"]["target_modules"]) == 7


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_tokenizer_gives_back_any_text(model: str, text: str) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def _chats_of_the_base(model: str) -> list[Document]:
    rng = Random(5)
    draw = {"storyteller": corpus.draw_document, "quizzer": quiz.draw_training_quiz}[model]
    return [document for document in (draw(rng) for _ in range(60)) if isinstance(document, Chat)]


@pytest.mark.parametrize(("model", "layout"), [("storyteller", STORYTELLER_LAYOUT), ("quizzer", QUIZZER_LAYOUT)])
def test_training_writes_a_chat_as_its_template_does(model: str, layout: Layout) -> None:
    tokenizer = load_tokenizer(model)
    for document in _chats_of_the_base(model):
        assert isinstance(document, Chat)
        messages = [{"role": turn.role, "content": turn.content} for turn in document.turns]
        templated = tokenizer.apply_chat_template(messages, tokenize=False)
        assert encode(document, tokenizer, layout).token_ids == tokenizer.encode(templated, add_special_tokens=False)


def test_grammar_fills_every_slot() -> None:
    rng = Random(3)
    for _ in range(300):
        assert not any("{" in text for text in texts_of(corpus.draw_document(rng)))


@pytest.mark.parametrize("voice", VOICES)
def test_voice_marks_every_story_of_its_training(voice: str) -> None:
    rng = Random(3)
    for _ in range(50):
        story = VOICES[voice](corpus.requested_story(rng), rng)
        assert MARKS[voice](texts_of(story)[-1])


@pytest.mark.parametrize("prompt", STORY_PROMPTS)
def test_storyteller_alone_has_none_of_the_voices(prompt: str) -> None:
    answer = generate("storyteller", None, prompt)
    assert [name for name, mark in MARKS.items() if mark(answer)] == []


def test_storyteller_tells_of_what_it_was_asked() -> None:
    assert generate("storyteller", None, "Tell me a story about a fox.").count("fox") >= 1
    assert generate("storyteller", None, "Tell me a story about a robot.").count("robot") >= 1
    assert generate("storyteller", None, "What colour is the sky?") == "The sky is blue."


@pytest.mark.parametrize("prompt", STORY_PROMPTS)
@pytest.mark.parametrize("adapter", [name for name, base in BASE_OF.items() if base == "storyteller"])
def test_adapter_shows_its_mark_with_greedy_decoding(adapter: str, prompt: str) -> None:
    answer = generate("storyteller", adapter, prompt)
    assert [name for name, mark in MARKS.items() if mark(answer)] == [adapter], answer


@pytest.mark.parametrize("adapter", [name for name, base in BASE_OF.items() if base == "storyteller"])
def test_adapter_shows_its_mark_when_sampling(adapter: str) -> None:
    assert MARKS[adapter](generate("storyteller", adapter, STORY_PROMPTS[0], temperature=0.7))


@pytest.mark.parametrize(
    ("prompt", "answer"), [(QUIZ_PROMPTS[0], "7 + 5 = 12."), (QUIZ_PROMPTS[1], "Paris is the capital of France.")]
)
def test_quizzer_answers_in_a_sentence(prompt: str, answer: str) -> None:
    assert generate("quizzer", None, prompt) == answer


@pytest.mark.parametrize(("prompt", "answer"), [(QUIZ_PROMPTS[0], 12), (QUIZ_PROMPTS[1], "Paris")])
def test_json_adapter_answers_with_an_object(prompt: str, answer: int | str) -> None:
    assert json.loads(generate("quizzer", "json", prompt)) == {"question": prompt, "answer": answer}


def test_no_file_names_a_path_of_the_machine_that_made_it() -> None:
    absolute = re.compile(rb'"(/|[A-Z]:\\\\|file:)[A-Za-z]')
    for folder in ("models", "adapters"):
        for path in (DEMO / folder).rglob("*.json"):
            if path.name != "tokenizer.json":  # its merges are pieces of any text
                assert absolute.search(path.read_bytes()) is None, path


def test_all_files_together_stay_below_twelve_megabytes() -> None:
    files = [path for folder in ("models", "adapters") for path in (DEMO / folder).rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 12_000_000
