"""The words that the storyteller knows, and the cast of one story drawn from them."""

from dataclasses import dataclass
from random import Random
from typing import NamedTuple


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


class Animal(NamedTuple):
    home: str
    food: str
    legs: str
    sound: str


ANIMALS = {
    "fox": Animal("in a den", "berries and eggs", "four", "yip"),
    "owl": Animal("in a hollow tree", "mice and insects", "two", "hoot"),
    "cat": Animal("in a warm house", "fish", "four", "meow"),
    "dog": Animal("in a kennel", "bones and biscuits", "four", "woof"),
    "rabbit": Animal("in a burrow", "carrots and grass", "four", "squeak"),
    "bear": Animal("in a cave", "honey and fish", "four", "growl"),
    "mouse": Animal("in a small hole", "cheese and seeds", "four", "squeak"),
    "cow": Animal("on a farm", "grass and hay", "four", "moo"),
    "pig": Animal("in a sty", "corn and apples", "four", "oink"),
    "sheep": Animal("in a meadow", "grass", "four", "baa"),
    "duck": Animal("on a pond", "bread and seeds", "two", "quack"),
    "hen": Animal("in a coop", "corn", "two", "cluck"),
    "horse": Animal("in a stable", "hay and apples", "four", "neigh"),
    "lion": Animal("on the savanna", "meat", "four", "roar"),
    "tiger": Animal("in the jungle", "meat", "four", "roar"),
    "elephant": Animal("on the savanna", "leaves and fruit", "four", "trumpet"),
    "monkey": Animal("in the jungle", "bananas", "two", "chatter"),
    "frog": Animal("near a pond", "flies", "four", "croak"),
    "bee": Animal("in a hive", "nectar", "six", "buzz"),
    "wolf": Animal("in the forest", "meat", "four", "howl"),
    "hedgehog": Animal("under a hedge", "worms and insects", "four", "snuffle"),
    "squirrel": Animal("in a tree", "nuts", "four", "chatter"),
    "penguin": Animal("on the ice", "fish", "two", "honk"),
    "whale": Animal("in the sea", "tiny shrimps", "no", "woo"),
    "snake": Animal("under a rock", "mice and eggs", "no", "hiss"),
    "spider": Animal("in a web", "flies", "eight", "whisper"),
    "crow": Animal("in a tall tree", "seeds and worms", "two", "caw"),
    "donkey": Animal("on a farm", "hay and carrots", "four", "bray"),
    "goat": Animal("on a mountain", "grass and leaves", "four", "bleat"),
    "parrot": Animal("in the jungle", "fruit and nuts", "two", "squawk"),
    "turtle": Animal("near a river", "leaves and snails", "four", "hiss"),
    "deer": Animal("in the forest", "leaves and bark", "four", "bleat"),
}

PEOPLE = words(
    "robot dragon knight wizard witch pirate giant baker farmer sailor teacher doctor painter ghost fairy unicorn "
    "snowman clown gardener astronaut mermaid elf troll king queen prince princess boy girl fisherman singer "
    "shepherd tailor train cloud star puppet inventor explorer monster goblin child"
)

RARE_HEROES = words(
    "badger otter beaver panda koala kangaroo zebra giraffe camel hippo rhino llama alpaca moose yak walrus seal "
    "dolphin octopus jellyfish lobster crab snail beetle ladybird moth butterfly dragonfly sparrow robin swan "
    "goose heron eagle hawk falcon puffin flamingo peacock ostrich gecko lizard chameleon crocodile salamander "
    "toad newt mole weasel ferret hamster lemur gorilla sloth armadillo anteater porcupine skunk raccoon jackal "
    "hyena leopard cheetah panther lynx bison buffalo gazelle antelope ram pony mule rooster turkey pigeon raven "
    "magpie kingfisher plumber pilot dancer juggler carpenter blacksmith librarian detective scarecrow phoenix "
    "griffin yeti ogre gnome genie samurai viking programmer postman nurse lighthouse teapot bicycle tractor "
    "umbrella"
)

HEROES = (*ANIMALS, *PEOPLE)
HERO_ADJECTIVES = words(
    "little brave kind clever gentle shy curious cheerful young old lazy proud funny quiet friendly tiny sleepy honest"
)
MALE_KINDS = frozenset(words("king prince boy wizard snowman fisherman postman"))
FEMALE_KINDS = frozenset(words("queen princess girl witch mermaid fairy hen cow"))
FEMALE_NAMES = words("Ruby Lily Rosie Daisy Molly Luna Poppy Hazel Willow Ivy Clara Nora Ella Mia Ada Tilly")
MALE_NAMES = words("Oliver Max Toby Felix Leo Jasper Finn Hugo Oscar Rufus Barnaby Benny Otto Milo Sam Theo")
RARE_FEMALE_NAMES = words("Anna Alice Amira Bella Elena Fatima Grace Hana Ines Jana Maria Nadia Priya Rosa Sofia Zara")
RARE_MALE_NAMES = words("Bruno Chen Diego Emil Gus Igor Karl Kofi Lars Omar Pedro Quentin Tariq Umar Xavier Zoltan")

PLACES = phrases(
    "in the forest|by the sea|on a green hill|in a small village|near a quiet lake|in an old castle|on a farm|"
    "in a tall tower|beside a river|at the edge of a desert|on a tiny island|in a big city|high in the mountains|"
    "in a wooden hut|under an old bridge|in a sunny valley|behind the mill|in a cave|in a garden|"
    "at the end of a long road"
)
THINGS = words(
    "kite ball hat key book lamp bell drum boat coat ring spoon basket pencil flute mirror scarf button clock map "
    "cup shoe doll coin crown letter blanket whistle lantern apple"
)
THING_ADJECTIVES = words("red blue green golden silver old shiny wooden round tiny favourite striped")
WEATHER = words("sunny rainy windy cold warm snowy foggy cloudy bright stormy")
HOBBIES = phrases(
    "to sing|to dance|to read books|to swim|to climb trees|to bake cakes|to count the stars|to paint pictures|"
    "to play the flute|to fly kites|to look at the moon|to collect shells|to tell jokes|to build things|"
    "to sleep in the sun"
)
SKILLS = phrases("swim|sing|dance|read|ride a bicycle|bake bread|paint|whistle|climb|skate|juggle|play the drum")
FOODS = words("bread cake soup honey cheese apples berries pie nuts pancakes porridge carrots cookies pears")
MORALS = phrases(
    "a good friend is better than gold|it is always good to share|being brave means trying again|"
    "kind words can change a day|small friends can be a great help|everybody makes mistakes|"
    "it is fine to ask for help|the best gifts come from the heart|patience is a treasure|"
    "telling the truth is best"
)


def with_article(noun: str) -> str:
    """The noun behind "a" or "an", by its first sound: a unicorn, an honest man."""
    vowel = (noun[0].lower() in "aeiou" and not noun.startswith("uni")) or noun.startswith("honest")
    return f"{'an' if vowel else 'a'} {noun}"


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


class Person(NamedTuple):
    name: str
    kind: str
    adjective: str
    female: bool


@dataclass(frozen=True, slots=True)
class Cast:
    """Everything that a story may mention. The hero and the friend differ in kind and in name."""

    hero: Person
    friend: Person
    place: str
    thing: str
    weather: str
    hobby: str
    skill: str
    food: str
    moral: str

    def slots(self) -> dict[str, str]:
        """The words for the templates of ``stories``, by slot."""
        slots = {
            "place": self.place,
            "thing": self.thing,
            "a_thing": with_article(self.thing),
            "weather": self.weather,
            "hobby": self.hobby,
            "skill": self.skill,
            "food": self.food,
            "moral": self.moral,
        }
        for prefix, person in (("", self.hero), ("f_", self.friend)):
            he, him, his = ("she", "her", "her") if person.female else ("he", "him", "his")
            own = {"name": person.name, "kind": person.kind, "adj": person.adjective}
            own |= {"he": he, "him": him, "his": his, "He": capitalised(he), "His": capitalised(his)}
            own["an_adj_kind"] = with_article(f"{person.adjective} {person.kind}")
            slots |= {prefix + slot: word for slot, word in own.items()}
        return slots


def invented_word(rng: Random) -> str:
    """A word that nobody knows, in pieces for the tokenizer: from such the model learns to copy whatever it reads."""

    def syllable() -> str:
        return f"{rng.choice('bdfgklmnprstvz')}{rng.choice('aeiou')}{rng.choice(('', '', 'n', 'r', 'l'))}"

    return syllable() + syllable() + rng.choice(("", "x", "k", "ro", "la"))


def draw_person(rng: Random, *, other_than: Person | None = None, kind: str | None = None) -> Person:
    """A person of the given kind, or of a kind that ``other_than`` is not."""
    if kind is None:
        kinds = RARE_HEROES if rng.random() < 0.15 else (invented_word(rng),) if rng.random() < 0.04 else HEROES
        kind = rng.choice([k for k in kinds if other_than is None or k != other_than.kind] or HEROES)
    female = kind in FEMALE_KINDS or (kind not in MALE_KINDS and rng.random() < 0.5)
    common, rare = (FEMALE_NAMES, RARE_FEMALE_NAMES) if female else (MALE_NAMES, RARE_MALE_NAMES)
    names = rare if rng.random() < 0.12 else common
    name = rng.choice([n for n in names if other_than is None or n != other_than.name])
    return Person(name, kind, rng.choice(HERO_ADJECTIVES), female)


def draw_cast(rng: Random, *, hero_kind: str | None = None) -> Cast:
    hero = draw_person(rng, kind=hero_kind)
    return Cast(
        hero=hero,
        friend=draw_person(rng, other_than=hero),
        place=rng.choice(PLACES),
        thing=f"{rng.choice(THING_ADJECTIVES)} {rng.choice(THINGS)}",
        weather=rng.choice(WEATHER),
        hobby=rng.choice(HOBBIES),
        skill=rng.choice(SKILLS),
        food=rng.choice(FOODS),
        moral=rng.choice(MORALS),
    )
