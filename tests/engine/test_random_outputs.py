"""Thousands of outputs of models that know nothing, with the vocabularies of real tokenizers: none breaks its form.

`LORAPLEX_FORM_OUTPUTS` says how many, of which each tokenizer gets its share.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.v1.generation_pb2 import Choices, Constraint
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, SetVocabulary, StepOutput
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_service.requests.forms import checked_grammar
from loraplex_service.text import Tokenizer
from tests.reference.stepping import step

jsonschema = pytest.importorskip("jsonschema")
transformers = pytest.importorskip("transformers")

TOKENIZERS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "tokenizers"
NAMES = ["gpt2_bpe", "tinyllama_llama2_fast", "qwen2_bpe_slow"]
OUTPUTS = int(os.environ.get("LORAPLEX_FORM_OUTPUTS", "10000"))
AT_ONCE = 64
MAX_TOKENS = 160

Form = tuple[Constraint, Callable[[str], bool]]  # a form, and its judge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="needs the shared tokenizers"),
]


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose values are short: what has no end in sight says nothing."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "date"]
    kind = draw.choice(kinds + ["array", "object", "anyOf"] * 2 * (depth > 0))
    match kind:
        case "string":
            least = draw.randrange(3)
            return {"type": "string", "minLength": least, "maxLength": least + draw.randrange(8)}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(["^[a-f]{1,6}$", "^\\d{3}-\\d{2}$", "^(ja|nein|é+x)$"])}
        case "integer":
            low = draw.randrange(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(500)}
        case "number":
            return {"type": "number", "minimum": -1, "exclusiveMaximum": draw.choice([1, 2.5, 1000])}
        case "enum":
            return {"enum": draw.sample(["a", "b\n", 1, 2.5, None, True, {"x": [1]}, [], "é"], draw.randrange(1, 5))}
        case "date":
            return {"type": "string", "format": draw.choice(["date", "uuid", "ipv4", "time"])}
        case "array":
            least = draw.randrange(3)
            return {
                "type": "array",
                "items": random_schema(draw, depth - 1),
                "minItems": least,
                "maxItems": least + draw.randrange(3),
            }
        case "anyOf":
            return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randrange(1, 4))]}
        case "object":
            names = draw.sample(["id", "näme", "a b", "x", "list", "kind"], draw.randrange(1, 5))
            return {
                "type": "object",
                "properties": {name: random_schema(draw, depth - 1) for name in names},
                "required": draw.sample(names, draw.randrange(len(names) + 1)),
                "additionalProperties": False,
            }
        case _:
            return {"type": kind}


def of_schema(schema: dict[str, Any]) -> Form:
    checker = jsonschema.Draft202012Validator(schema)
    return Constraint(json_schema=json.dumps(schema)), lambda text: checker.is_valid(json.loads(text))


def of_regex(pattern: str) -> Form:
    return Constraint(regex=pattern), lambda text: re.fullmatch(pattern, text, re.ASCII) is not None


def forms() -> list[Form]:
    draw = random.Random(0)
    choices = ["yes", "no", "perhaps", "ja, é"]
    balanced = Constraint(grammar='root ::= "(" root ")" | "x" | "[" root "]"')
    return [
        *(of_schema(random_schema(draw)) for _ in range(60)),
        *(
            of_regex(pattern)
            for pattern in (r"[a-z]{3,12}@[a-z]{2,8}\.(com|org)", r"(\d{1,3}, ){0,5}\d", "é{2,9}|[^a]b{4}")
        ),
        (Constraint(choices=Choices(values=choices)), choices.__contains__),
        (balanced, lambda text: re.fullmatch(r"([(\[])*x([)\]])*", text) is not None and is_balanced(text)),
    ]


def is_balanced(text: str) -> bool:
    half = len(text) // 2
    return text[half] == "x" and text[:half].translate(str.maketrans("([", ")]"))[::-1] == text[half + 1 :]


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.load(TOKENIZERS / request.param)


@pytest.fixture
def core(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[EngineCore]:
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1} | heads
    vocab_size = tokenizer.num_token_ids + 7  # a head that is padded
    config = transformers.LlamaConfig(**shape, vocab_size=vocab_size, max_position_embeddings=512)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    core = EngineCore.load(EngineConfig(model=str(tmp_path), kv_cache_bytes=16 << 20, max_num_seqs=AT_ONCE, threads=2))
    core.set_vocabulary(SetVocabulary(list(tokenizer.vocabulary)))
    yield core
    core.close()


def test_no_output_breaks_its_form(
    core: EngineCore, tokenizer: Tokenizer, record_property: Callable[[str, object], None]
) -> None:
    known = [(checked_grammar(constraint), judge) for constraint, judge in forms()]
    (eos,) = tokenizer.eos_token_ids or (tokenizer.num_token_ids - 1,)
    tokens: dict[int, list[int]] = {}
    ends: Counter[FinishReason] = Counter()
    broken: list[str] = []
    waiting = iter(range(OUTPUTS // len(NAMES)))
    while True:
        while len(tokens) < 2 * AT_ONCE and (number := next(waiting, None)) is not None:
            sampling = SamplingParams(
                seed=number,
                max_tokens=MAX_TOKENS,
                temperature=(0.5, 1.0, 3.0)[number % 3],
                eos_token_ids=(eos,),
                num_token_ids=tokenizer.num_token_ids,
                logit_bias={eos: 6.0},
            )
            tokens[number] = []
            core.add(AddRequest(number, [1, 2], sampling, grammar=known[number % len(known)][0]))
        if not tokens:
            break
        for message in step(core):
            for output in message.outputs if isinstance(message, StepOutput) else ():
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is None:
                    continue
                drawn = tokens.pop(output.request_id)
                ends[output.finish_reason] += 1
                text = b"".join(tokenizer.token_bytes(token) for token in drawn if token != eos).decode(
                    errors="replace"
                )
                is_whole = output.finish_reason in (FinishReason.EOS, FinishReason.STOP)
                judge = known[output.request_id % len(known)][1]
                if output.error or (is_whole and not judge(text)):
                    broken.append(f"{forms()[output.request_id % len(known)][0]} {text!r} {output.error}")
    record_property("ends", {reason.name: count for reason, count in ends.items()})
    print(ends)
    assert broken == []
    assert ends[FinishReason.MAX_TOKENS] < sum(ends.values()) / 20
