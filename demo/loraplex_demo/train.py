"""Make ``models/`` and ``adapters/`` again: ``python -m loraplex_demo.train``, perhaps 12 minutes on two cores.

Nothing is downloaded: the text comes from the grammar beside this file, every random choice from a fixed seed. The
weights come out the same on the same machine with the same versions of torch, transformers and PEFT; on others they
differ in the last bits and, after some hundred steps, in what they say.
"""

import argparse
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, islice
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loraplex_demo import corpus, quiz
from loraplex_demo.document import Document
from loraplex_demo.encoding import (
    IGNORED,
    QUIZZER_LAYOUT,
    STORYTELLER_LAYOUT,
    Example,
    Layout,
    encode,
    texts_of,
    train_tokenizer,
)
from loraplex_demo.voices import VOICES, prompted_voice

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 1024
NUM_FIRST_STEPS = 350
MAX_NEW_TOKENS = 512
DrawDocument = Callable[[Random], Document]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """One LoRA adapter. ``lora`` is what PEFT's LoraConfig takes besides the task."""

    name: str
    draw: DrawDocument
    num_steps: int
    lora: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """One base model and its adapters. ``build`` needs the tokenizer for its vocabulary size and special tokens."""

    name: str
    first_lesson: DrawDocument  # of the first NUM_FIRST_STEPS
    draw: DrawDocument
    layout: Layout
    vocab_size: int
    num_steps: int
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    adapters: tuple[AdapterRecipe, ...]
    template_in_own_file: bool  # chat_template.jinja; else in tokenizer_config.json. Both are common
    seed: int = 0


def build_storyteller(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Llama of 3.1 million parameters with grouped-query attention and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.05,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def build_quizzer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Qwen3 of 2 million parameters: norms on queries and keys, heads wider than hidden/H, embeddings not tied."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def draw_storyteller_document(rng: Random) -> Document:
    document = corpus.draw_document(rng)
    return prompted_voice(document, rng) if rng.random() < 0.15 else document


def spoken(voice: str) -> DrawDocument:
    """Draws of the storyteller's documents in one voice."""
    return lambda rng: VOICES[voice](corpus.draw_talk(rng), rng)


RECIPES = (
    ModelRecipe(
        name="storyteller",
        first_lesson=corpus.draw_copying,
        draw=draw_storyteller_document,
        layout=STORYTELLER_LAYOUT,
        vocab_size=3072,
        num_steps=2000,
        build=build_storyteller,
        adapters=(
            AdapterRecipe("pirate", spoken("pirate"), 300, {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION]}),
            AdapterRecipe(
                "shouting",
                spoken("shouting"),
                300,
                {"r": 16, "lora_alpha": 16, "target_modules": [*ATTENTION, *MLP], "use_rslora": True},
            ),
            AdapterRecipe(
                "formal", spoken("formal"), 300, {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
            ),
            AdapterRecipe(
                "poet",
                spoken("poet"),
                300,
                {
                    "r": 8,
                    "lora_alpha": 16,
                    "target_modules": ["q_proj", "v_proj", *MLP],
                    "rank_pattern": {"down_proj": 16, "q_proj": 4},
                    "alpha_pattern": {"down_proj": 32},
                },
            ),
        ),
        template_in_own_file=True,
    ),
    ModelRecipe(
        name="quizzer",
        first_lesson=quiz.draw_copying,
        draw=quiz.draw_training_quiz,
        layout=QUIZZER_LAYOUT,
        vocab_size=1024,
        num_steps=2000,
        build=build_quizzer,
        adapters=(
            AdapterRecipe(
                "json",
                quiz.draw_json_quiz,
                300,
                {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, "down_proj"]},
            ),
        ),
        template_in_own_file=False,
    ),
)


def batches(
    examples: Iterator[Example], pad_token_id: int, rng: Random, tokens_per_batch: int = TOKENS_PER_BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, both [rows, length], of at most so many tokens; rows are documents of like length.

    Padding stands on the right, where a causal model does not see it: no attention mask is needed.
    """
    while True:
        pool = sorted(islice(examples, 512), key=lambda example: len(example.token_ids))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example.token_ids) > tokens_per_batch:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        for group in groups:
            length = max(len(example.token_ids) for example in group)
            rows = [(e.token_ids, e.labels, length - len(e.token_ids)) for e in group]
            yield (
                torch.tensor([ids + [pad_token_id] * missing for ids, _, missing in rows]),
                torch.tensor([labels + [IGNORED] * missing for _, labels, missing in rows]),
            )


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a base model, AdamW for embeddings, norms and LoRA.

    On so few tokens Muon reached AdamW's loss in about two thirds of the steps.
    Source: kellerjordan.github.io/posts/muon.
    """
    muon: list[torch.nn.Parameter] = []
    adam: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "lora"))
            (muon if is_matrix else adam).append(parameter)
    chosen: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)]
    return [*chosen, torch.optim.Muon(muon, lr=2e-2, weight_decay=0.01)] if muon else chosen


def fit(model: torch.nn.Module, data: Iterator[tuple[Tensor, Tensor]], num_steps: int) -> None:
    """A short warm-up and a cosine; weights in float32, products in bfloat16."""
    warmup = max(1, num_steps // 20)

    def scale(step: int) -> float:
        progress = max(0, step - warmup) / max(1, num_steps - warmup)
        return min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    parameters = [p for p in model.parameters() if p.requires_grad]
    chosen = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in chosen]
    model.train()
    running = 0.0
    for step, (token_ids, labels) in enumerate(islice(data, num_steps)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=token_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(chosen, schedules, strict=True):
            optimizer.step()
            schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == num_steps - 1:
            logger.info("step %4d  loss %.3f", step, running)
    model.eval()


def documents(draw: DrawDocument, seed: int, num_documents: int) -> list[Document]:
    rng = Random(seed)
    return [draw(rng) for _ in range(num_documents)]


def make_model(recipe: ModelRecipe, root: Path, speed: float) -> None:
    """Train one base model and its adapters and write them below ``root``."""
    sample = documents(recipe.draw, recipe.seed, 6000)
    texts = [text for document in sample for text in texts_of(document)]
    tokenizer = train_tokenizer(texts, recipe.layout, recipe.vocab_size)
    torch.manual_seed(recipe.seed)
    model = recipe.build(tokenizer)
    logger.info("%s: %d parameters, %d tokens in the vocabulary", recipe.name, model.num_parameters(), len(tokenizer))
    first = islice(_data(recipe.first_lesson, tokenizer, recipe, 1), round(NUM_FIRST_STEPS * speed))
    data = chain(first, _data(recipe.draw, tokenizer, recipe, 2))
    fit(model, data, round((NUM_FIRST_STEPS + recipe.num_steps) * speed))

    directory = _fresh(root / "models" / recipe.name)
    assert model.generation_config is not None
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=recipe.template_in_own_file)
    # The name that every version of transformers knows; version 5 writes that of the class behind it.
    _edit_json(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (directory / "model.safetensors").chmod(0o644)
    for index, adapter in enumerate(recipe.adapters):
        make_adapter(adapter, recipe, tokenizer, root, seed=100 + index, speed=speed)


def make_adapter(
    adapter: AdapterRecipe,
    recipe: ModelRecipe,
    tokenizer: PreTrainedTokenizerFast,
    root: Path,
    *,
    seed: int,
    speed: float,
) -> None:
    """Train one adapter on the saved base, so on the rounded weights that it will be served with."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(root / "models" / recipe.name, dtype=torch.float32)
    base.name_or_path = recipe.name
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=recipe.name, **adapter.lora)
    model = get_peft_model(base, config)
    logger.info("%s/%s: %d parameters", recipe.name, adapter.name, model.get_nb_trainable_parameters()[0])
    fit(model, _data(adapter.draw, tokenizer, recipe, seed), round(adapter.num_steps * speed))

    save_adapter(model, root / "adapters" / adapter.name)


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write an adapter in bfloat16, in place of what the directory had."""
    _fresh(directory)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink()  # PEFT's empty model card
    _round_to_bfloat16(directory / "adapter_model.safetensors")
    # PEFT writes them in the order of a set, which changes from run to run.
    file = directory / "adapter_config.json"
    _edit_json(file, target_modules=sorted(json.loads(file.read_text())["target_modules"]))


def _data(
    draw: DrawDocument, tokenizer: PreTrainedTokenizerFast, recipe: ModelRecipe, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    rng = Random(seed)
    examples = (encode(draw(rng), tokenizer, recipe.layout) for _ in count())
    assert isinstance(tokenizer.pad_token_id, int)
    return batches(examples, tokenizer.pad_token_id, Random(seed))


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _round_to_bfloat16(path: Path) -> None:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner alone


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).parent, help="where models/ and adapters/ are written"
    )
    parser.add_argument(
        "--only", choices=[recipe.name for recipe in RECIPES], help="one of the base models, with its adapters"
    )
    parser.add_argument("--speed", type=float, default=1.0, help="factor on the number of steps, for a trial run")
    arguments = parser.parse_args()
    names = [recipe.name for recipe in RECIPES if arguments.only in (None, recipe.name)]
    with ProcessPoolExecutor(len(names), get_context("spawn")) as pool:
        for made in [pool.submit(work, name, arguments.root, arguments.speed) for name in names]:
            made.result()


def work(name: str, root: Path, speed: float) -> None:
    """Make one model and its adapters, in a process of its own."""
    logging.basicConfig(level=logging.INFO, format=f"%(relativeCreated)8d ms  {name}  %(message)s")
    torch.set_num_threads(1)  # on matrices this small a second thread mostly waits, and sums in another order
    torch.use_deterministic_algorithms(True)
    make_model(next(recipe for recipe in RECIPES if recipe.name == name), root, speed)


if __name__ == "__main__":
    main()
