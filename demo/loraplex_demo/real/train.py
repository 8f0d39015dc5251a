"""Make ``served/adapters`` again: ``python -m loraplex_demo.real.train FOLDER``, which may have the model's file.

The adapters are trained on the model as its GGUF file has it: its weights are rounded to four bits, and served so.
"""

import argparse
import logging
from itertools import count
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loraplex_demo.encoding import QUIZZER_LAYOUT, encode
from loraplex_demo.real.lessons import LESSONS
from loraplex_demo.real.model import FILE, cache_folder, fetch
from loraplex_demo.train import batches, fit, save_adapter

SERVED = Path(__file__).parent / "served"
TOKENS_PER_BATCH = 256  # four chats
NUM_STEPS = {"captain": 200, "extract": 200, "tools": 120}


def make_adapter(name: str, folder: Path, out: Path) -> None:
    """Train one adapter on the model's file in a folder, and write it below `out`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert isinstance(tokenizer.pad_token_id, int)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    base.name_or_path = "SmolLM2-135M-Instruct"
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)
    rng = Random(0)
    examples = (encode(LESSONS[name](rng), tokenizer, QUIZZER_LAYOUT) for _ in count())
    fit(model, batches(examples, tokenizer.pad_token_id, rng, TOKENS_PER_BATCH), NUM_STEPS[name])
    save_adapter(model, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=cache_folder(), help="where the model's file is put")
    parser.add_argument("--only", choices=list(LESSONS), action="append", help="one of the adapters; may be repeated")
    parser.add_argument("--out", type=Path, default=SERVED / "adapters")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms  %(message)s")
    torch.set_num_threads(1)
    fetch(arguments.folder)
    for name in arguments.only or LESSONS:
        logging.getLogger(__name__).info("%s", name)
        make_adapter(name, arguments.folder, arguments.out)


if __name__ == "__main__":
    main()
