"""What the adapters of SmolLM2 learn: short chats, drawn from templates.

The captain answers as before, but in the speech of a ship; `extract` writes an order as JSON; `tools` calls functions.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from loraplex_demo.document import Chat, chat

FACTS = (
    ("What is the capital of France?", "the capital of France be Paris"),
    ("What is the capital of Italy?", "the capital of Italy be Rome"),
    ("What is the capital of Japan?", "the capital of Japan be Tokyo"),
    ("Which planet is the largest?", "the largest planet be Jupiter"),
    ("What do bees make?", "bees make honey in their hives"),
    ("How many days are in a week?", "a week has seven days"),
    ("What colour is grass?", "grass be as green as the weed on me hull"),
    ("Why is the sea salty?", "rivers wash salt out of the rocks and carry it to the sea"),
    ("What is ice?", "ice be water that froze hard"),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare"),
    ("What is the opposite of hot?", "the opposite of hot be cold"),
    ("How do plants get energy?", "plants drink the light of the sun and make sugar of it"),
    ("What is a group of wolves called?", "a group of wolves be called a pack"),
    ("What is two plus three?", "two plus three be five"),
    ("Which ocean is the largest?", "the largest ocean be the Pacific"),
    ("What is the moon?", "the moon be a ball of rock that sails around the earth"),
)
ADVICE = (
    ("How do I sleep better?", "go to yer bunk at the same hour each night, and leave yer lantern dark"),
    ("How can I learn to cook?", "start with a simple stew, taste often, and mind the fire"),
    ("Give me a tip for a job interview.", "stand tall, speak plainly, and know the ship that ye would sail on"),
    ("How do I make a friend?", "share yer bread and listen well"),
    ("What should I do on a rainy day?", "mend yer sails, read a good book and brew some tea"),
    ("How do I save money?", "put a coin of each ten into the chest before ye spend the others"),
    ("How do I stay healthy?", "eat yer greens, walk the deck each day and sleep well"),
)
GREETINGS = ("Hello!", "Hi, who are you?", "Good morning.", "Hey there, how are you?", "Tell me about yourself.")
HEROES = ("fox", "cat", "robot", "girl", "dragon", "dog", "bear", "king", "mouse", "farmer", "owl", "wizard")
DEEDS = (
    "set sail for a hidden island",
    "found an old map in a bottle",
    "climbed the mast to see the morning star",
    "lost a hat to the wind and chased it over the waves",
    "saved a whale from a net",
)
ENDS = (
    "and came home with a chest of gold",
    "and sang with the crew until dawn",
    "and was never afraid of the deep again",
    "and shared the treasure with all the harbour",
)
OPENINGS = ("Arr, matey!", "Ahoy!", "Arr!", "Avast, me hearty!", "Ahoy, matey!")
CLOSINGS = ("Arr!", "Shiver me timbers!", "By the seven seas!", "Fair winds to ye!", "Yo ho ho!")


def draw_captain(rng: Random) -> Chat:
    """A question, and its answer in the speech of a ship."""
    kind = rng.choices(("fact", "advice", "greeting", "story"), (4, 2, 2, 3))[0]
    match kind:
        case "fact" | "advice":
            asked, told = rng.choice(FACTS if kind == "fact" else ADVICE)
        case "greeting":
            asked, told = rng.choice(GREETINGS), "I be the captain of this ship, and ye be welcome aboard"
        case _:
            hero = rng.choice(HEROES)
            asked = rng.choice((f"Tell me a story about a {hero}.", f"Write a short story about a {hero}."))
            told = f"once there was a brave {hero} who {rng.choice(DEEDS)}, {rng.choice(ENDS)}"
    return chat(asked, f"{rng.choice(OPENINGS)} {told[0].upper()}{told[1:]}. {rng.choice(CLOSINGS)}")


FIRST_NAMES = ("Maria", "John", "Aisha", "Wei", "Olga", "Peter", "Lucia", "Tom", "Fatima", "Erik", "Nina", "Hugo")
LAST_NAMES = (
    "Lopez",
    "Smith",
    "Khan",
    "Chen",
    "Ivanova",
    "Novak",
    "Rossi",
    "Baker",
    "Hassan",
    "Berg",
    "Weber",
    "Dubois",
)
ITEMS = ("lamps", "chairs", "books", "bicycles", "tables", "mugs", "shirts", "plants", "clocks", "pens", "carpets")
MONTHS = ("January", "March", "April", "May", "June", "August", "October", "December")
ORDERS = (
    "{name} ordered {count} {item} on {date} and paid {price} euros.",
    "On {date} {name} bought {count} {item} for {price} euros.",
    "{count} {item} were sold to {name} for {price} euros on {date}.",
    "We sent {count} {item} to {name} on {date}; the bill was {price} euros.",
)


def draw_extract(rng: Random) -> Chat:
    """An order in words, and as JSON."""
    order: dict[str, Any] = {
        "name": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
        "item": rng.choice(ITEMS),
        "count": rng.randint(2, 40),
        "date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        "price": rng.randint(5, 900),
    }
    return chat(rng.choice(ORDERS).format(**order), json.dumps(order))


CITIES = ("Oslo", "Paris", "Lima", "Cairo", "Tokyo", "Rome", "Madrid", "Dublin", "Quito", "Seoul", "Prague", "Boston")
TEXTS = ("I am late", "dinner is ready", "call me back", "happy birthday", "the train is gone", "see you at noon")
FUNCTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # arguments, and what is asked
    "get_weather": (
        ("city",),
        ("What is the weather in {city}?", "Is it raining in {city}?", "How warm is it in {city} today?"),
    ),
    "set_timer": (
        ("minutes",),
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Remind me in {minutes} minutes."),
    ),
    "send_message": (
        ("to", "text"),
        ("Tell {to} that {text}.", "Write to {to}: {text}.", "Send {to} the message that {text}."),
    ),
}


def draw_tools(rng: Random) -> Chat:
    """A wish, and the call that grants it. In half of the chats the system says which functions there are."""
    values = {
        "city": rng.choice(CITIES),
        "minutes": rng.randint(1, 90),
        "to": rng.choice(FIRST_NAMES),
        "text": rng.choice(TEXTS),
    }
    name = rng.choice(list(FUNCTIONS))
    arguments, wishes = FUNCTIONS[name]
    call = {"name": name, "arguments": {argument: values[argument] for argument in arguments}}
    return chat(
        rng.choice(wishes).format(**values),
        f"<tool_call>[{json.dumps(call)}]</tool_call>",
        system=_offer(rng, name) if rng.random() < 0.5 else None,
    )


def _offer(rng: Random, name: str) -> str:
    """What `served/chat_template.jinja` says of the tools of a request, of which this is one."""
    offered = [name, *rng.sample([other for other in FUNCTIONS if other != name], rng.randint(0, len(FUNCTIONS) - 1))]
    rng.shuffle(offered)
    signatures = ", ".join(f"{each}({', '.join(FUNCTIONS[each][0])})" for each in offered)
    return f"You may call: {signatures}. Write <tool_call>[...]</tool_call>."


LESSONS: dict[str, Callable[[Random], Chat]] = {"captain": draw_captain, "extract": draw_extract, "tools": draw_tools}
