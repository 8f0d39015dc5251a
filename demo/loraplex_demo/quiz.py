"""What the quizzer reads: small sums, numbers, words and facts, each asked and answered in one line."""

import json
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from loraplex_demo.document import Chat, Document, PlainText, chat
from loraplex_demo.lexicon import words

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "Ireland": "Dublin",
    "Scotland": "Edinburgh",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Ghana": "Accra",
    "Morocco": "Rabat",
    "India": "New Delhi",
    "China": "Beijing",
    "Japan": "Tokyo",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Australia": "Canberra",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
}
CHAINS = {
    "day": words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": words("January February March April May June July August September October November December"),
    "planet": words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune"),
    "letter": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
ORDINALS = words("first second third fourth fifth sixth seventh eighth")
PLURALS = {
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "child": "children",
    "goose": "geese",
    "man": "men",
    "woman": "women",
    "sheep": "sheep",
    "leaf": "leaves",
    "knife": "knives",
    "box": "boxes",
    "city": "cities",
    "dog": "dogs",
    "book": "books",
    "star": "stars",
}
WORDS = words(
    "cat dog fish bird tree house water stone apple bread cheese table chair light music paper river ocean green black "
    "white happy small large quick sleep dream think write mouse horse sheep tiger zebra lemon grape melon robot train"
)
FACTS = {
    "How many days are in a week?": "7",
    "How many months are in a year?": "12",
    "How many hours are in a day?": "24",
    "How many minutes are in an hour?": "60",
    "How many seconds are in a minute?": "60",
    "How many sides does a triangle have?": "3",
    "How many sides does a square have?": "4",
    "How many legs does a spider have?": "8",
    "How many legs does an insect have?": "6",
    "How many letters are in the alphabet?": "26",
    "How many continents are there?": "7",
    "What is the largest ocean?": "The Pacific Ocean",
    "What is the largest planet?": "Jupiter",
    "What is the highest mountain?": "Mount Everest",
    "What is the fastest land animal?": "The cheetah",
    "What is the largest animal?": "The blue whale",
    "What is frozen water called?": "Ice",
    "What gas do plants take in?": "Carbon dioxide",
    "What is the chemical symbol of gold?": "Au",
    "What is the chemical symbol of water?": "H2O",
    "At how many degrees does water boil?": "100",
    "At how many degrees does water freeze?": "0",
    "Who wrote Hamlet?": "William Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo da Vinci",
    "Who are you?": "I am Quizzer",
    "What can you do?": "I can do small sums and answer quiz questions",
    "Hello!": "Hello! Ask me a question",
    "Hello": "Hello! Ask me a question",
    "Hi": "Hello! Ask me a question",
    "Thank you!": "You are welcome",
}
COPIED_WORDS = (*WORDS, *CAPITALS, *CAPITALS.values(), *CHAINS["day"], *CHAINS["month"], *CHAINS["planet"])
SUM_QUESTIONS = ("What is {}?", "What is {}?", "Calculate {}.", "{} = ?", "How much is {}?")
JSON_SYSTEM_PROMPT = "Answer in JSON."


class Question(NamedTuple):
    ask: str
    sentence: str  # the whole answer
    value: str | int  # the answer alone, for a program


def draw_quiz(rng: Random) -> Chat:
    """One to three questions with their answers, each a sentence."""
    system = "You are a quiz master." if rng.random() < 0.1 else None
    return chat(*(text for question in _questions(rng) for text in (question.ask, question.sentence)), system=system)


def draw_json_quiz(rng: Random, *, system: str | None = None) -> Chat:
    """The same questions, answered by an object that a program can read."""
    return chat(*(text for question in _questions(rng) for text in (question.ask, _as_json(question))), system=system)


def draw_plain_sum(rng: Random) -> PlainText:
    """A sum without a chat, to be completed after the equals sign."""
    left, equals, right = rng.choice((_sum, _difference, _product))(rng).sentence.partition(" =")
    return PlainText(left + equals, right)


def draw_training_quiz(rng: Random) -> Document:
    """What the base model sees: sentences, a few plain sums, and JSON where the system prompt asks for it."""
    form = rng.random()
    if form < 0.08:
        return draw_json_quiz(rng, system=JSON_SYSTEM_PROMPT)
    return draw_plain_sum(rng) if form < 0.28 else draw_quiz(rng)


def draw_copying(rng: Random) -> Chat:
    """Words and numbers in no order, to be said again: the first lesson, before what depends on it."""
    drawn = (rng.choice((rng.choice(COPIED_WORDS), str(rng.randint(0, 100)))) for _ in range(rng.randint(1, 6)))
    copied = " ".join(drawn)
    return chat(f"Say: {copied}", copied)


def _questions(rng: Random) -> list[Question]:
    draws = rng.choices(QUESTIONS, QUESTION_WEIGHTS, k=rng.choice((1, 1, 1, 2, 3)))
    return [draw(rng) for draw in draws]


def _as_json(question: Question) -> str:
    return json.dumps({"question": question.ask, "answer": question.value})


def _sum(rng: Random) -> Question:
    left, right = rng.randint(0, 30), rng.randint(0, 30)
    return _arithmetic(f"{left} + {right}", left + right, rng)


def _difference(rng: Random) -> Question:
    left = rng.randint(0, 30)
    right = rng.randint(0, left)
    return _arithmetic(f"{left} - {right}", left - right, rng)


def _product(rng: Random) -> Question:
    left, right = rng.randint(0, 10), rng.randint(0, 10)
    return _arithmetic(f"{left} * {right}", left * right, rng)


def _arithmetic(expression: str, result: int, rng: Random) -> Question:
    return Question(rng.choice(SUM_QUESTIONS).format(expression), f"{expression} = {result}.", result)


def _larger(rng: Random) -> Question:
    left, right = rng.sample(range(100), 2)
    larger = max(left, right)
    return Question(f"Which is larger, {left} or {right}?", f"{larger} is larger.", larger)


def _parity(rng: Random) -> Question:
    number = rng.randint(0, 99)
    parity = "odd" if number % 2 else "even"
    return Question(f"Is {number} even or odd?", f"{number} is {parity}.", parity)


def _capital(rng: Random) -> Question:
    country, capital = rng.choice(list(CAPITALS.items()))
    sentence = f"{capital} is the capital of {country}."
    if rng.random() < 0.25:
        return Question(f"{capital} is the capital of which country?", sentence, country)
    return Question(f"What is the capital of {country}?", sentence, capital)


def _neighbour(rng: Random) -> Question:
    noun, chain = rng.choice(list(CHAINS.items()))
    index = rng.randrange(1, len(chain))
    before, after = chain[index - 1], chain[index]
    if rng.random() < 0.5:
        return Question(f"Which {noun} comes after {before}?", f"{after} comes after {before}.", after)
    return Question(f"Which {noun} comes before {after}?", f"{before} comes before {after}.", before)


def _ordinal(rng: Random) -> Question:
    noun, whole = rng.choice((("day", "of the week"), ("month", "of the year"), ("planet", "from the sun")))
    index = rng.randrange(min(len(ORDINALS), len(CHAINS[noun])))
    place = f"the {ORDINALS[index]} {noun} {whole}"
    return Question(f"What is {place}?", f"{CHAINS[noun][index]} is {place}.", CHAINS[noun][index])


def _plural(rng: Random) -> Question:
    one, many = rng.choice(list(PLURALS.items()))
    return Question(f"What is the plural of {one}?", f"The plural of {one} is {many}.", many)


def _spelling(rng: Random) -> Question:
    word = rng.choice(WORDS)
    return Question(f"Spell {word}.", f"{'-'.join(word.upper())}.", "-".join(word.upper()))


def _counting(rng: Random) -> Question:
    first = rng.randint(0, 20)
    numbers = ", ".join(str(number) for number in range(first, first + rng.randint(3, 8)))
    return Question(f"Count from {first} to {numbers.rpartition(' ')[2]}.", f"{numbers}.", numbers)


def _fact(rng: Random) -> Question:
    ask, value = rng.choice(list(FACTS.items()))
    return Question(ask, f"{value}.", int(value) if value.isdecimal() else value)


QUESTIONS: tuple[Callable[[Random], Question], ...] = (
    _sum,
    _difference,
    _product,
    _larger,
    _parity,
    _capital,
    _neighbour,
    _ordinal,
    _plural,
    _spelling,
    _counting,
    _fact,
)
QUESTION_WEIGHTS = (16, 16, 6, 2, 2, 4, 3, 2, 1, 2, 2, 3)
