"""The two tokenizers, and documents as token ids with the part that a model is to learn marked."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from loraplex_demo.document import Chat, Document

IGNORED = -100  # label of a token that the loss leaves out

STORYTELLER_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Only the roles system, user and assistant are known, not ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
CHATML_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """The marks around the turns of a chat and around a plain text. ``beginning`` may be empty."""

    special_tokens: tuple[str, ...]
    chat_template: str
    beginning: str  # before every document
    turn_start: str  # with the role in it
    turn_end: str  # ends the model's answer: the end-of-sequence token
    between_turns: str
    padding: str
    digits_apart: bool  # one token for each digit


STORYTELLER_LAYOUT = Layout(
    special_tokens=("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"),
    chat_template=STORYTELLER_TEMPLATE,
    beginning="<|begin|>",
    turn_start="<|{role}|>",
    turn_end="<|end|>",
    between_turns="",
    padding="<|pad|>",
    digits_apart=False,
)
QUIZZER_LAYOUT = Layout(
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    chat_template=CHATML_TEMPLATE,
    beginning="",
    turn_start="<|im_start|>{role}\n",
    turn_end="<|im_end|>",
    between_turns="\n",
    padding="<|endoftext|>",
    digits_apart=True,
)


def train_tokenizer(texts: Iterable[str], layout: Layout, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text comes back as it was, as all 256 bytes are in the vocabulary."""
    tokenizer = Tokenizer(BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), byte_level])
        if layout.digits_apart
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(layout.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if layout.beginning:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{layout.beginning} $A",
            pair=f"{layout.beginning} $A {layout.beginning} $B",
            special_tokens=[(layout.beginning, tokenizer.token_to_id(layout.beginning))],
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # its parameters carry no annotations
        tokenizer_object=tokenizer,
        bos_token=layout.beginning or None,
        eos_token=layout.turn_end,
        pad_token=layout.padding,
        chat_template=layout.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


@dataclass(frozen=True, slots=True)
class Example:
    """A document as tokens. ``labels`` is ``token_ids`` with IGNORED where somebody else is speaking."""

    token_ids: list[int]
    labels: list[int]


def encode(document: Document, tokenizer: PreTrainedTokenizerFast, layout: Layout) -> Example:
    """The document as the chat template writes it, one token sequence, of which the model's own words are learned."""
    token_ids: list[int] = []
    labels: list[int] = []

    def add(text: str, *, learned: bool) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        token_ids.extend(ids)
        labels.extend(ids if learned else [IGNORED] * len(ids))

    add(layout.beginning, learned=False)
    if isinstance(document, Chat):
        for turn in document.turns:
            add(layout.turn_start.format(role=turn.role), learned=False)
            add(turn.content + layout.turn_end, learned=turn.role == "assistant")
            add(layout.between_turns, learned=False)
    else:
        add(document.prompt, learned=False)
        add(document.continuation + layout.turn_end, learned=True)
    return Example(token_ids, labels)


def texts_of(document: Document) -> list[str]:
    if isinstance(document, Chat):
        return [turn.content for turn in document.turns]
    return [document.prompt + document.continuation]
