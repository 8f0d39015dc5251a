"""What the storyteller reads: stories, told freely or on request, and the small talk of a friendly assistant."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from loraplex_demo.document import Chat, Document, PlainText, chat
from loraplex_demo.lexicon import (
    ANIMALS,
    FEMALE_NAMES,
    FOODS,
    HERO_ADJECTIVES,
    HEROES,
    HOBBIES,
    MALE_NAMES,
    PEOPLE,
    RARE_FEMALE_NAMES,
    RARE_HEROES,
    RARE_MALE_NAMES,
    SKILLS,
    THING_ADJECTIVES,
    THINGS,
    WEATHER,
    Cast,
    capitalised,
    draw_cast,
    invented_word,
    phrases,
    with_article,
    words,
)
from loraplex_demo.stories import PLOTS, tell_long_story, tell_short_story, tell_story

SYSTEM_PROMPTS = (
    "You are a storyteller.",
    "You are a helpful assistant.",
    "You are a friendly assistant who tells short stories.",
    "Answer the question.",
    "Be kind and clear.",
)

COLOURS = {
    "sky": "blue",
    "grass": "green",
    "sun": "yellow",
    "snow": "white",
    "night": "black",
    "sea": "blue",
    "moon": "white",
    "fire": "orange",
    "blood": "red",
    "gold": "yellow",
    "milk": "white",
    "coal": "black",
    "chocolate": "brown",
    "earth": "brown",
    "cloud": "grey",
}
FRUIT_COLOURS = {
    "banana": "yellow",
    "tomato": "red",
    "strawberry": "red",
    "lemon": "yellow",
    "carrot": "orange",
    "cucumber": "green",
    "cherry": "red",
    "plum": "purple",
    "leaf": "green",
    "raven": "black",
    "frog": "green",
    "fox": "red",
    "pig": "pink",
    "elephant": "grey",
    "polar bear": "white",
}
OPPOSITES = phrases(
    "hot cold|big small|happy sad|day night|up down|fast slow|old young|light dark|good bad|wet dry|loud quiet|"
    "open closed|high low|hard soft|full empty|early late|strong weak|rich poor|left right|long short|sweet sour|"
    "true false|begin end|love hate|first last|clean dirty|brave afraid|yes no|in out|near far"
)
GROUPS = {
    "fruits": words("apple banana cherry pear plum lemon peach grape"),
    "animals": sorted(ANIMALS),
    "colours": words("red blue green yellow purple orange white black"),
    "names": [*FEMALE_NAMES, *MALE_NAMES],
    "things": THINGS,
    "foods": FOODS,
}
NUMBERS = words("one two three four five six seven eight nine ten eleven twelve")
FACTS = {
    "How many days are in a week?": "There are seven days in a week.",
    "How many months are in a year?": "There are twelve months in a year.",
    "How many seasons are there?": "There are four seasons: spring, summer, autumn and winter.",
    "What do we call frozen water?": "Frozen water is called ice.",
    "What do bees make?": "Bees make honey.",
    "Where does milk come from?": "Milk comes from cows.",
    "Where does the sun rise?": "The sun rises in the east.",
    "When do the stars come out?": "The stars come out at night.",
    "What do plants need?": "Plants need water, light and air.",
    "What falls from the clouds?": "Rain falls from the clouds, and snow when it is cold.",
    "What is the largest animal?": "The largest animal is the blue whale.",
    "What is the king of the jungle?": "People say that the lion is the king of the jungle.",
    "What is a friend?": "A friend is somebody who is kind to you and helps you.",
    "What is a story?": "A story tells what happened to somebody, and why it matters.",
    "What is love?": "Love is when you are happy because somebody else is happy.",
    "What is the meaning of life?": "Nobody knows for sure, but being kind is a good start.",
}
SMALL_TALK = {
    "Hello!": "Hello! How can I help you?",
    "Hello": "Hello! How can I help you?",
    "Hi!": "Hi! Would you like to hear a story?",
    "Hi": "Hi! Would you like to hear a story?",
    "Hi there!": "Hi! Would you like to hear a story?",
    "Good morning!": "Good morning! I hope you slept well.",
    "Good evening!": "Good evening! It is a fine time for a story.",
    "Good night!": "Good night! Sleep well and dream of something nice.",
    "How are you?": "I am very well, thank you. How are you?",
    "How are you today?": "I am very well, thank you. How are you?",
    "I am fine.": "I am glad to hear that. Would you like a story?",
    "I am sad.": "I am sorry to hear that. Shall I tell you a funny story?",
    "I am bored.": "Then let us have a story! Who should it be about?",
    "Who are you?": "I am a very small model that loves to tell stories.",
    "What is your name?": "My name is Storyteller.",
    "What are you?": "I am a very small model that loves to tell stories.",
    "What can you do?": "I can tell stories, answer simple questions and do small tasks with words.",
    "Help!": "Do not worry. Ask me for a story, or ask me a simple question.",
    "Can you help me?": "Of course! Ask me for a story, or ask me a simple question.",
    "Thank you!": "You are welcome!",
    "Thank you very much!": "You are very welcome!",
    "Thanks!": "You are welcome!",
    "Goodbye!": "Goodbye! Come back soon for another story.",
    "Bye!": "Goodbye! Come back soon for another story.",
    "Do you like stories?": "Yes, I love stories more than anything.",
    "Where do you live?": "I live inside a computer, in a very small file.",
    "How old are you?": "I am very young. I was made only a short time ago.",
    "Tell me a joke.": "Why did the cow cross the road? To get to the moo-vies!",
    "Sing a song.": "La la la, the sun is high, and little birds fly in the sky!",
    "What is your favourite colour?": "My favourite colour is blue, like the sky.",
    "What is your favourite animal?": "I like the fox best, because it is in so many stories.",
}
UNKNOWN_TOPICS = phrases(
    "taxes|the stock market|quantum physics|the weather tomorrow|France|Java|the year 1848|a database|politics|"
    "football|chemistry|the capital of Peru|a carburettor|the price of gold|inflation|Mars|bitcoin|my exam|"
    "the internet|electricity|the law|opera|chess|a volcano|gravity|the Romans|algebra|medicine|your weights|"
    "engines"
)
UNKNOWN_QUESTIONS = (
    "What do you know about {topic}?",
    "Explain {topic}.",
    "Can you explain {topic} to me?",
    "What about {topic}?",
    "How does {topic} work?",
)

COPIED_WORDS = (
    *HEROES,
    *RARE_HEROES,
    *FEMALE_NAMES,
    *MALE_NAMES,
    *HERO_ADJECTIVES,
    *THINGS,
    *THING_ADJECTIVES,
    *FOODS,
    *WEATHER,
)
STORY_VERBS = (
    "Tell me",
    "Tell me",
    "Write",
    "Write me",
    "Please tell me",
    "Can you tell me",
    "I would like",
    "Give me",
)
STORY_TOPICS: tuple[Callable[[Cast, str], str], ...] = (
    lambda cast, plot: with_article(cast.hero.kind),
    lambda cast, plot: with_article(cast.hero.kind),
    lambda cast, plot: with_article(cast.hero.kind),
    lambda cast, plot: f"the {cast.hero.kind}",
    lambda cast, plot: with_article(f"{cast.hero.adjective} {cast.hero.kind}"),
    lambda cast, plot: f"{with_article(cast.hero.kind)} named {cast.hero.name}",
    lambda cast, plot: f"{with_article(cast.hero.kind)} called {cast.hero.name}",
    lambda cast, plot: f"{cast.hero.name} the {cast.hero.kind}",
    lambda cast, plot: f"{with_article(cast.hero.kind)} and {with_article(cast.friend.kind)}",
    lambda cast, plot: f"{with_article(cast.hero.kind)} who lived {cast.place}",
    lambda cast, plot: f"{with_article(cast.hero.kind)} and {plot}",
)


def draw_copying(rng: Random, *, max_words: int = 6) -> Chat:
    """Words in no order, to be said again. The first lesson, as a story must keep to the hero that was asked for.

    Copying is a circuit of two attention layers that stories alone, long and mostly predictable, are slow to teach.
    Source: induction heads, transformer-circuits.pub/2022/in-context-learning-and-induction-heads.
    """
    num_words = rng.randint(1, max_words)
    copied = " ".join(rng.choice(COPIED_WORDS) if rng.random() < 0.9 else invented_word(rng) for _ in range(num_words))
    if rng.random() < 0.25:
        copied = copied.upper()
    return chat(f"{rng.choice(('Say', 'Repeat', 'Copy'))}: {copied}", copied)


def draw_document(rng: Random) -> Document:
    """One document of the storyteller's training text."""
    return long_copying(rng) if rng.random() < 0.08 else draw_talk(rng)


def draw_talk(rng: Random) -> Document:
    """A document in which something is said, so that a voice may say it in its own way."""
    kinds: tuple[tuple[int, Callable[[Random], Document]], ...] = (
        (26, plain_story),
        (36, requested_story),
        (6, story_and_question),
        (2, another_story),
        (9, small_talk),
        (18, question),
        (8, task),
        (3, two_questions),
    )
    document = rng.choices([draw for _, draw in kinds], [weight for weight, _ in kinds])[0](rng)
    return carelessly(document) if isinstance(document, Chat) and rng.random() < 0.15 else document


def carelessly(document: Chat) -> Chat:
    """The same chat with the user's turns as many people type them: no capital at the beginning, no mark at the end."""
    turns = [
        turn._replace(content=turn.content[:1].lower() + turn.content[1:].rstrip(".?!"))
        if turn.role == "user"
        else turn
        for turn in document.turns
    ]
    return replace(document, turns=tuple(turns))


def plain_story(rng: Random) -> PlainText:
    """A story without a chat, cut after a few of its first words."""
    cast = draw_cast(rng)
    text = tell_long_story(cast, _two_plots(rng), rng) if rng.random() < 0.2 else tell_story(cast, _plot(rng), rng)
    first_sentence = text[: text.index(".")].split(" ")
    num_words = rng.randint(2, len(first_sentence))
    prompt = " ".join(first_sentence[:num_words])
    if num_words == 2 + (first_sentence[0] == "Once") * 2:
        prompt = prompt.rstrip(",")  # "Once upon a time", as most people would type it
    return PlainText(prompt, text[len(prompt) :], cast)


def requested_story(rng: Random) -> Chat:
    cast = draw_cast(rng)
    request, story = _request_and_story(cast, rng)
    return chat(request, story, system=_system(rng), cast=cast)


def story_and_question(rng: Random) -> Chat:
    """A story and what the listener wants to know about it afterwards."""
    cast = draw_cast(rng)
    hero, friend = cast.hero, cast.friend
    plot = _plot(rng)
    verb = rng.choice(STORY_VERBS)
    request = f"{verb} a story about {rng.choice(STORY_TOPICS)(cast, plot)}{_full_stop(verb)}"
    questions = (
        (f"What was the {hero.kind} called?", f"The {hero.kind} was called {hero.name}."),
        (f"What was the name of the {hero.kind}?", f"The name of the {hero.kind} was {hero.name}."),
        ("Who was the story about?", f"It was about {hero.name} the {hero.kind}."),
        (f"Where did {hero.name} live?", f"{hero.name} lived {cast.place}."),
        (f"Where did the {hero.kind} live?", f"The {hero.kind} lived {cast.place}."),
        (f"Who was {friend.name}?", f"{friend.name} was {with_article(friend.kind)}."),
        ("Thank you!", f"You are welcome! I am glad that you like {hero.name}."),
    )
    return chat(request, tell_story(cast, plot, rng), *rng.choice(questions), system=_system(rng), cast=cast)


def another_story(rng: Random) -> Chat:
    """Two stories about the same kind of hero, the second one asked for in few words."""
    cast = draw_cast(rng)
    again = draw_cast(rng, hero_kind=cast.hero.kind)
    request = f"Tell me a short story about {with_article(cast.hero.kind)}."
    ask = rng.choice(("Tell me another one.", "Another one, please.", "One more, please!", "Again!"))
    first, second = (tell_short_story(c, _plot(rng), rng) for c in (cast, again))
    return chat(request, first, ask, second, system=_system(rng), cast=again)


def small_talk(rng: Random) -> Chat:
    return chat(*_greeted(_small_talk_pair(rng), rng), system=_system(rng))


def question(rng: Random) -> Chat:
    return chat(*_greeted(_question_pair(rng), rng), system=_system(rng))


def two_questions(rng: Random) -> Chat:
    """Small talk or a question, and then another question."""
    first = _small_talk_pair(rng) if rng.random() < 0.4 else _question_pair(rng)
    return chat(*first, *_question_pair(rng), system=_system(rng))


def long_copying(rng: Random) -> Chat:
    return draw_copying(rng, max_words=30)


def task(rng: Random) -> Chat:
    return chat(*rng.choice((_capitals, _count, _listing, _sentence, _repeat, _naming))(rng), system=_system(rng))


def _system(rng: Random) -> str | None:
    return rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None


def _plot(rng: Random) -> str:
    return rng.choice(list(PLOTS))


def _two_plots(rng: Random) -> tuple[str, str]:
    first, second = rng.sample(list(PLOTS), 2)
    return first, second


def _full_stop(verb: str) -> str:
    return "?" if verb.startswith("Can") else "."


def _request_and_story(cast: Cast, rng: Random) -> tuple[str, str]:
    """Words that ask for a story, and the story that they ask for."""
    plot = _plot(rng)
    form = rng.random()
    verb = rng.choice(STORY_VERBS)
    topic = rng.choice(STORY_TOPICS)(cast, plot)
    if form < 0.57:
        return f"{verb} a story about {topic}{_full_stop(verb)}", tell_story(cast, plot, rng)
    if form < 0.64:
        return f"A story about {topic}, please.", tell_story(cast, plot, rng)
    if form < 0.76:
        return f"{verb} a short story about {topic}{_full_stop(verb)}", tell_short_story(cast, _plot(rng), rng)
    if form < 0.9:
        plots = (plot, rng.choice([p for p in PLOTS if p != plot]))
        return f"{verb} a long story about {topic}{_full_stop(verb)}", tell_long_story(cast, plots, rng)
    if form < 0.93:
        return f"Tell me about {topic}.", tell_story(cast, plot, rng)
    if form < 0.97:
        return f"{verb} a story{_full_stop(verb)}", tell_story(cast, plot, rng)
    return f"{verb} a story about {plot}{_full_stop(verb)}", tell_story(cast, plot, rng)


def _greeted(pair: tuple[str, str], rng: Random) -> tuple[str, str]:
    """A question, one time in five with a greeting or a "please" before it, which changes nothing in the answer."""
    ask, answer = pair
    if rng.random() < 0.8 or not ask.endswith("?"):
        return ask, answer
    lead = rng.choice(("Hello! ", "Hello, ", "Hi, ", "Hi! ", "Please tell me: ", "Please, "))
    return (lead + ask if lead.endswith("! ") else lead + ask[:1].lower() + ask[1:]), answer


def _small_talk_pair(rng: Random) -> tuple[str, str]:
    return rng.choice(list(SMALL_TALK.items()))


def _question_pair(rng: Random) -> tuple[str, str]:
    return rng.choice((_colour, _colour, _opposite, _animal, _animal, _number_of_legs, _fact, _unknown))(rng)


def _colour(rng: Random) -> tuple[str, str]:
    spelling = rng.choice(("colour", "colour", "color"))
    if rng.random() < 0.6:
        thing, colour = rng.choice(list(COLOURS.items()))
        subject = (
            thing
            if thing in {"grass", "snow", "blood", "gold", "milk", "coal", "chocolate", "fire"}
            else f"the {thing}"
        )
    else:
        thing, colour = rng.choice(list(FRUIT_COLOURS.items()))
        subject = with_article(thing)
    ask = rng.choice(
        (f"What {spelling} is {subject}?", f"Which {spelling} is {subject}?", f"What is the {spelling} of {subject}?")
    )
    return ask, f"{capitalised(subject)} is {colour}."


def _opposite(rng: Random) -> tuple[str, str]:
    word, opposite = rng.sample(rng.choice(OPPOSITES).split(" "), 2)
    return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."


def _animal(rng: Random) -> tuple[str, str]:
    kind, animal = rng.choice(list(ANIMALS.items()))
    one = with_article(kind)
    return rng.choice(
        (
            (f"Where does {one} live?", f"{capitalised(one)} lives {animal.home}."),
            (f"What does {one} eat?", f"{capitalised(one)} eats {animal.food}."),
            (f"What does {one} say?", f'{capitalised(one)} says "{animal.sound}".'),
            (f"What sound does {one} make?", f'{capitalised(one)} says "{animal.sound}".'),
            (f"What is {one}?", f"{capitalised(one)} is an animal that lives {animal.home} and eats {animal.food}."),
        )
    )


def _number_of_legs(rng: Random) -> tuple[str, str]:
    kind, animal = rng.choice(list(ANIMALS.items()))
    one = with_article(kind)
    return f"How many legs does {one} have?", f"{capitalised(one)} has {animal.legs} legs."


def _fact(rng: Random) -> tuple[str, str]:
    return rng.choice(list(FACTS.items()))


def _unknown(rng: Random) -> tuple[str, str]:
    topic = rng.choice(UNKNOWN_TOPICS)
    ask = rng.choice(UNKNOWN_QUESTIONS).format(topic=topic)
    return ask, f"I am too small to know about {topic}, but I can tell you a story."


def _some_sentence(rng: Random) -> str:
    """A short sentence, without its full stop."""
    one = rng.choice(
        (
            f"the {rng.choice(HEROES)}",
            f"the {rng.choice(RARE_HEROES)}",
            rng.choice((*RARE_FEMALE_NAMES, *RARE_MALE_NAMES)),
        )
    )
    thing = f"{rng.choice(THING_ADJECTIVES)} {rng.choice(THINGS)}"
    return rng.choice(
        (
            f"{one} has {with_article(thing)}",
            f"{one} loves {rng.choice(HOBBIES)}",
            f"{one} can {rng.choice(SKILLS)}",
            f"{one} likes {rng.choice(FOODS)}",
            f"I love {rng.choice(FOODS)}",
            f"good morning, {rng.choice(FEMALE_NAMES)}",
        )
    )


def _capitals(rng: Random) -> tuple[str, str]:
    sentence = _some_sentence(rng)
    ask = rng.choice(("Write in capital letters:", "Say it in capital letters:", "Write this in big letters:"))
    return f"{ask} {sentence}", sentence.upper()


def _repeat(rng: Random) -> tuple[str, str]:
    sentence = _some_sentence(rng)
    return f"{rng.choice(('Repeat:', 'Say:', 'Repeat after me:'))} {sentence}", f"{capitalised(sentence)}."


def _count(rng: Random) -> tuple[str, str]:
    last = rng.randint(2, len(NUMBERS))
    return f"Count to {NUMBERS[last - 1]}.", f"{capitalised(', '.join(NUMBERS[:last]))}."


def _listing(rng: Random) -> tuple[str, str]:
    group = rng.choice(list(GROUPS))
    count = rng.randint(2, 5)
    *first, last = rng.sample(GROUPS[group], count)
    ask = rng.choice((f"List {NUMBERS[count - 1]} {group}.", f"Name {NUMBERS[count - 1]} {group}."))
    return ask, f"{capitalised(', '.join(first))} and {last}."


def _sentence(rng: Random) -> tuple[str, str]:
    word = rng.choice((*HEROES, *RARE_HEROES))
    place = draw_cast(rng).place
    return f"Make a sentence with the word {word}.", f"The {word} slept {place}."


def _naming(rng: Random) -> tuple[str, str]:
    kind = rng.choice((*ANIMALS, *PEOPLE))
    name = rng.choice((*FEMALE_NAMES, *MALE_NAMES))
    ask = rng.choice((f"Give me a name for {with_article(kind)}.", f"What is a good name for {with_article(kind)}?"))
    return ask, f"A good name for {with_article(kind)} is {name}."
