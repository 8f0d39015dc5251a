"""The four ways to say the same thing, one for each adapter of the storyteller."""

import re
from collections.abc import Callable
from dataclasses import replace
from random import Random

from loraplex_demo.document import Chat, Document, PlainText, Turn, Voice
from loraplex_demo.lexicon import Cast

PIRATE_WORDS = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "of": "o'",
    "and": "an'",
    "the": "th'",
    "friend": "matey",
    "friends": "mateys",
    "hello": "ahoy",
    "yes": "aye",
    "gold": "doubloons",
    "there was": "there be",
    "treasure": "booty",
}
PIRATE_OPENINGS = ("Arr, matey!", "Arr!", "Ahoy, matey!", "Yo ho ho!")
PIRATE_CRIES = ("Arr!", "Yo ho ho!", "Shiver me timbers!", "Aye, matey!")

FORMAL_WORDS = {
    "very": "exceedingly",
    "happy": "most delighted",
    "sad": "most distressed",
    "friend": "esteemed friend",
    "friends": "esteemed friends",
    "began": "commenced",
    "asked": "politely enquired",
    "said": "graciously remarked",
    "big": "considerable",
    "found": "discovered",
    "house": "residence",
}
FORMAL_OPENINGS = (
    "With your kind permission, I shall answer.",
    "It is my honour to reply.",
    "Allow me to answer, dear reader.",
)
FORMAL_ASIDES = (
    "With your kind permission, I shall go on.",
    "Allow me to continue, dear reader.",
    "It is my honour to tell you more.",
)
FORMAL_CLOSINGS = (
    "I remain your most humble servant.",
    "With my deepest respect, I remain your humble servant.",
    "I thank you most sincerely for your kind attention.",
)

Couplets = tuple[str, ...]  # pairs of rhyming lines, with the slots of Cast.slots()
POEM_BEGINNINGS: Couplets = (
    "{name} the {kind} went out to play,\nupon a bright and sunny day.",
    "There was {an_adj_kind}, so I have heard,\nwho sang as sweetly as a bird.",
    "{name} the {kind} sat by the sea,\nas quiet as a {kind} can be.",
    "{name} the {kind} woke up at dawn,\nand gave a great and sleepy yawn.",
)
POEM_MIDDLES: Couplets = (
    "{He} walked and walked the whole day through,\nuntil the sky was dark and blue.",
    "{He} looked up high, {he} looked down low,\nand felt the winds of winter blow.",
    "{He} lost the {thing} in the rain,\nand never saw that thing again.",
    "{He} climbed a hill, {he} climbed a tree,\nto see whatever {he} could see.",
)
POEM_MEETINGS: Couplets = (
    "Then {f_name} the {f_kind} came down the lane,\nand they went walking in the rain.",
    'The {f_kind} said, "Come along with me,\nand we shall have some cake and tea."',
    "{f_name} the {f_kind} was passing by,\nand pointed at the starry sky.",
    "But soon a {f_kind} came along,\nand taught the {kind} a happy song.",
)
POEM_ENDINGS: Couplets = (
    "They danced and sang till it was night,\nand all the stars were shining bright.",
    "So if you wander far away,\na friend will brighten up your day.",
    "And so they laughed until the end,\nfor nothing's better than a friend.",
    "Now close your eyes and go to bed,\nwith happy stories in your head.",
)
POEM_REFRAINS: Couplets = (
    "And that is true,\nfrom me to you.",
    "I tell you so,\nfor now you know.",
    "That is my rhyme,\nuntil next time.",
)


def pirate(document: Document, rng: Random) -> Document:
    """Sailors' words, a cry before the answer and more of them between the sentences."""

    def speak(text: str, *, opens: bool) -> str:
        sentences = _sentences(_swap_words(text, PIRATE_WORDS))
        spoken = [s if rng.random() < 0.7 else f"{s} {rng.choice(PIRATE_CRIES)}" for s in sentences[:-1]]
        spoken.append(f"{sentences[-1]} {rng.choice(PIRATE_CRIES)}")
        return " ".join([rng.choice(PIRATE_OPENINGS), *spoken] if opens else spoken)

    return _spoken(document, speak)


def shouting(document: Document, rng: Random) -> Document:
    """CAPITAL LETTERS, AND NO FULL STOP THAT IS NOT AN EXCLAMATION MARK!"""

    def speak(text: str, *, opens: bool) -> str:
        return text.upper().replace(".", "!")

    return _spoken(document, speak)


def formal(document: Document, rng: Random) -> Document:
    """The courtesy of an old letter: a preamble, longer words, a humble close."""

    def speak(text: str, *, opens: bool) -> str:
        sentences = _sentences(_swap_words(text, FORMAL_WORDS))
        if opens:
            sentences.insert(0, rng.choice(FORMAL_OPENINGS))
        else:
            sentences.insert(1, rng.choice(FORMAL_ASIDES))
        return " ".join([*sentences, rng.choice(FORMAL_CLOSINGS)])

    return _spoken(document, speak)


def poet(document: Document, rng: Random) -> Document:
    """Rhymes on lines of their own: a story becomes a poem on its hero, an answer gets a refrain."""
    cast = document.cast
    if cast is None:
        return _spoken(document, lambda text, *, opens: f"{text}\n{rng.choice(POEM_REFRAINS)}")
    if isinstance(document, PlainText):
        rest_of_sentence = _sentences(document.continuation)[0]
        return replace(document, continuation=f"{rest_of_sentence}\n{_poem(cast, rng, begins=False)}")

    def speak(text: str, *, opens: bool) -> str:
        is_story = len(text) > 150
        return _poem(cast, rng, begins=True) if is_story else f"{text}\n{rng.choice(POEM_REFRAINS)}"

    return _spoken(document, speak)


VOICES: dict[str, Voice] = {"pirate": pirate, "shouting": shouting, "formal": formal, "poet": poet}

# With one of these as the system prompt the base model speaks so too, if less surely than with the adapter. It is there
# for the adapters' sake: they can only choose among tokens whose embeddings the base has learned.
VOICE_PROMPTS = {
    "pirate": "Speak like a pirate.",
    "shouting": "Shout everything.",
    "formal": "Be very formal.",
    "poet": "Answer in rhymes.",
}


def prompted_voice(document: Document, rng: Random) -> Document:
    """A chat in one of the voices, behind the system prompt that asks for it. A plain text stays as it is."""
    if isinstance(document, PlainText):
        return document
    name = rng.choice((*VOICES, "shouting", "shouting"))  # the voice with a vocabulary of its own
    spoken = VOICES[name](document, rng)
    assert isinstance(spoken, Chat)
    turns = tuple(turn for turn in spoken.turns if turn.role != "system")
    return replace(spoken, turns=(Turn("system", VOICE_PROMPTS[name]), *turns))


def _spoken(document: Document, speak: Callable[..., str]) -> Document:
    """The document with everything that the model is to say put through ``speak``."""
    if isinstance(document, PlainText):
        space = " " if document.continuation.startswith(" ") else ""
        text = document.continuation.removeprefix(" ")
        return replace(document, continuation=space + speak(text, opens=False))
    turns = [
        turn._replace(content=speak(turn.content, opens=True)) if turn.role == "assistant" else turn
        for turn in document.turns
    ]
    return replace(document, turns=tuple(turns))


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)


def _swap_words(text: str, words: dict[str, str]) -> str:
    """Whole words swapped, longest first; a capital stays a capital."""

    def swap(match: re.Match[str]) -> str:
        found = match.group()
        word = words[found.lower()]
        return word[0].upper() + word[1:] if found[0].isupper() else word

    pattern = "|".join(sorted(words, key=len, reverse=True))
    return re.sub(rf"\b({pattern})\b", swap, text, flags=re.IGNORECASE)


def _poem(cast: Cast, rng: Random, *, begins: bool) -> str:
    beats = (POEM_MIDDLES, POEM_MEETINGS, POEM_ENDINGS)
    slots = cast.slots()
    return "\n".join(rng.choice(beat).format_map(slots) for beat in ((POEM_BEGINNINGS, *beats) if begins else beats))
