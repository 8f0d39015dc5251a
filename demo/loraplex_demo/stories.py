"""The grammar of the stories: an opening, the beats of one plot, an ending; each drawn from several phrasings."""

from dataclasses import replace
from random import Random

from loraplex_demo.lexicon import Cast, draw_person

Beat = tuple[str, ...]  # phrasings of one step of a plot, with the slots of Cast.slots()

OPENINGS: Beat = (
    "Once upon a time, there was {an_adj_kind} named {name} who lived {place}.",
    "Once upon a time, there lived {an_adj_kind} called {name}. {His} home was {place}.",
    "Once upon a time, {an_adj_kind} named {name} lived {place}.",
    "Once upon a time there was {an_adj_kind}. {His} name was {name}, and {he} lived {place}.",
    "Long ago, {an_adj_kind} called {name} lived {place}.",
    "There was once {an_adj_kind} named {name} who lived {place}.",
    "The {adj} {kind} lived {place}. {His} name was {name}.",
    "{name} was {an_adj_kind} who lived {place}.",
    "Far away, {place}, there lived {an_adj_kind} called {name}.",
    "In a time long ago, {an_adj_kind} named {name} lived {place}.",
)
TRAITS: Beat = (
    "{name} loved {hobby}.",
    "Every day, {name} liked {hobby}.",
    "More than anything, {he} loved {hobby}.",
    "The {kind} loved {hobby} and to eat {food}.",
    "Everybody knew that {name} liked {food} and loved {hobby}.",
)
ENDINGS: Beat = (
    "From that day on, {name} and {f_name} were the best of friends.",
    "And so {name} learned that {moral}. The end.",
    "{name} smiled all the way home, for {moral}.",
    "That night, {name} slept well and dreamed of {f_name} the {f_kind}. The end.",
    "And they all lived happily ever after.",
    "{name} and {f_name} ate {food} under the stars and were happy.",
    "And if you go there today, you may still see the {kind} and the {f_kind} laughing together.",
)

BRIDGES: Beat = ("But that was not the end of it.", "The story goes on.", "Some days later, something happened again.")

MEETINGS: Beat = (
    "Just then, {f_an_adj_kind} named {f_name} came along the path.",
    "Soon {he} met {f_name}, {f_an_adj_kind}.",
    "Then {f_an_adj_kind} came by. {f_His} name was {f_name}.",
    "Not far away, {he} saw {f_an_adj_kind} called {f_name}.",
)

PLOTS: dict[str, tuple[Beat, ...]] = {
    "losing something": (
        (
            "One {weather} morning, {name} lost {his} {thing}.",
            "But one {weather} day, {his} {thing} was gone.",
            "One {weather} day, {name} could not find {his} {thing}.",
        ),
        (
            "{He} looked under the bed and behind the door, but it was not there.",
            "{He} looked here and {he} looked there, but {he} could not find it.",
            "{name} searched all day long and began to cry.",
        ),
        MEETINGS,
        (
            '"Why are you so sad?" asked {f_name}. "I have lost my {thing}," said {name}.',
            '"What is the matter?" asked the {f_kind}. "My {thing} is gone," said {name}.',
        ),
        (
            '"Do not worry. I will help you," said {f_name}.',
            '"Come, let us look for it together," said the {f_kind}.',
        ),
        (
            "Together they found the {thing} under a big leaf.",
            "They looked in the tall grass, and there was the {thing}!",
            "At last, {f_name} saw the {thing} at the top of a tree.",
        ),
        ('"Thank you!" said {name}, and {he} danced with joy.', "{name} was so happy that {he} hugged {f_name}."),
    ),
    "friendship": (
        ("But {name} had no friends and often felt lonely.", "{He} was happy, but {he} wished for a friend."),
        ("One {weather} day, {name} went for a walk.", "One {weather} morning, {he} went out to find a friend."),
        MEETINGS,
        (
            '"Will you play with me?" asked {name}. "Yes, I would love to," said {f_name}.',
            '"Hello," said {name}. "Would you like to be my friend?" "Of course," said the {f_kind}.',
        ),
        (
            "They played with the {thing} until the sun went down.",
            "They shared some {food} and told each other funny stories.",
            "All day long they laughed and ran and played.",
        ),
        ("{name} was not lonely any more.", '"See you tomorrow!" said {f_name}, and {name} smiled.'),
    ),
    "a storm": (
        (
            "One day, dark clouds filled the sky and the wind began to blow.",
            "One evening, a great storm came. The rain fell and the thunder roared.",
        ),
        (
            "{name} was afraid and ran to find a dry place.",
            "{name} was cold and wet, and {he} did not know where to go.",
        ),
        MEETINGS,
        (
            '"Come in, come in!" said {f_name}. "My house is warm and dry."',
            '"You can stay with me until the storm is over," said the {f_kind}.',
        ),
        (
            "They sat by the fire, ate {food} and sang songs.",
            "{f_name} gave {him} a warm blanket and some {food}.",
        ),
        (
            "In the morning the sun came out, and there was a rainbow in the sky.",
            "At last the rain stopped, and the birds began to sing.",
        ),
    ),
    "a treasure": (
        (
            "One {weather} day, {name} found an old map.",
            "One {weather} morning, {he} found a map inside {a_thing}.",
        ),
        (
            '"A treasure!" said {name}, and {he} set out at once.',
            "The map showed the way to a secret treasure.",
        ),
        MEETINGS,
        (
            '"May I come with you?" asked {f_name}. "Yes, two are better than one," said {name}.',
            '"I know that road," said the {f_kind}. "Let me show you the way."',
        ),
        (
            "They walked over the hill, through the woods and across the river.",
            "They walked for three days and three nights.",
        ),
        (
            "Under a tall tree they began to dig, and soon they found a big box.",
            "Behind a waterfall they found a chest with a heavy lid.",
        ),
        (
            "Inside there was {a_thing} and a note: {moral}.",
            "It was full of gold, and they shared it with everybody {place}.",
        ),
    ),
    "a race": (
        (
            "One {weather} day, there was a big race.",
            "One {weather} morning, everybody came to see the great race.",
        ),
        (
            '{f_name} the {f_kind} was the fastest of all. "Nobody can beat me," said {f_name}.',
            '"I am going to win," said {f_name}, {f_an_adj_kind}.',
        ),
        ("They ran and ran, and the {f_kind} was far ahead.", "At first, {name} was the last of all."),
        (
            "But then {f_name} fell over a stone and hurt {f_his} foot.",
            "But near the end, {f_name} fell into the mud and could not get out.",
        ),
        (
            '{name} stopped. "Take my hand," said the {kind}.',
            "{name} did not run on. {He} went back to help.",
        ),
        (
            "They crossed the line together, and everybody cheered.",
            '"You won my heart," said {f_name}, and gave {him} the {thing} that was the prize.',
        ),
    ),
    "sharing": (
        (
            "One {weather} day, {name} made a lot of {food}.",
            "One {weather} morning, {name} had a basket full of {food}.",
        ),
        MEETINGS,
        (
            '"I am so hungry," said {f_name}. "I have not eaten all day."',
            "The {f_kind} looked thin and tired and very hungry.",
        ),
        (
            "{name} looked at the {food}. There was only a little, but {he} gave half of it to {f_name}.",
            '"Please eat with me," said {name}. "There is enough for two."',
        ),
        (
            '"Thank you, {name}," said the {f_kind}. "You have a kind heart."',
            "{f_name} ate and ate, and then {f_he} began to smile.",
        ),
        (
            "The next day, {f_name} came back with {a_thing} as a gift.",
            "In the winter, it was {f_name} who brought {food} to {name}.",
        ),
    ),
    "a rescue": (
        (
            'One {weather} day, {name} heard a small voice. "Help! Help!"',
            "One cold night, somebody called for help.",
        ),
        (
            "It was {f_name}, {f_an_adj_kind}, who had fallen into a deep hole.",
            "{f_name} the {f_kind} was stuck in the mud by the river.",
        ),
        (
            '"Do not be afraid," said {name}. "I will get you out."',
            "{name} was afraid too, but {he} wanted to be brave.",
        ),
        (
            "{He} found a long rope, tied it to a tree and pulled with all {his} might.",
            "{He} held out a long branch, and {f_name} held on to it.",
        ),
        (
            "One, two, three, and {f_name} was free!",
            "Slowly, slowly, the {f_kind} came out.",
        ),
        (
            '"You saved me!" said {f_name}. "How can I thank you?" "Just be my friend," said {name}.',
            "{f_name} gave {him} {a_thing} to say thank you.",
        ),
    ),
    "a strange noise": (
        (
            "One dark night, {name} heard a strange noise.",
            "Late one windy night, something went bump in the dark.",
        ),
        (
            '"Who is there?" whispered {name}, but nobody answered.',
            "{name} hid under the blanket, but the noise did not stop.",
        ),
        (
            "{He} took a lamp and opened the door very slowly.",
            "At last {he} got up, for {he} wanted to be brave.",
        ),
        (
            "It was only {f_name}, {f_an_adj_kind}, who was looking for {a_thing}.",
            "And there sat {f_an_adj_kind} named {f_name}, eating {food}.",
        ),
        (
            '"I am sorry that I woke you," said {f_name}. They both began to laugh.',
            '"You are not scary at all!" said {name}, and they laughed and laughed.',
        ),
    ),
    "learning something new": (
        (
            "But {name} could not {skill}, and that made {him} sad.",
            "One {weather} day, {name} wanted to learn to {skill}.",
        ),
        (
            "{He} tried once and {he} tried twice, but {he} could not do it.",
            '"I will never learn it," said {name}.',
        ),
        MEETINGS,
        (
            '"I can teach you to {skill}," said {f_name}. "You only have to try again."',
            '"Nobody can {skill} on the first day," said the {f_kind}. "Let us try together."',
        ),
        (
            "They practised every morning, in the sun and in the rain.",
            "Day after day they practised, and {f_name} never laughed at {him}.",
        ),
        (
            "And one fine day, {name} could {skill} better than anybody.",
            'Then, one {weather} day, it worked. "Look at me, I can {skill}!" said {name}.',
        ),
    ),
    "a birthday": (
        (
            "One {weather} day, it was the birthday of {f_name} the {f_kind}.",
            "{f_name}, {f_an_adj_kind}, was going to have a birthday.",
        ),
        (
            "{name} wanted to bring a gift, but {he} had no money at all.",
            '"What can I give to {f_name}?" thought {name}.',
        ),
        (
            "So {he} stayed up all night and made {a_thing}.",
            "So {he} baked {food} and wrote a little song.",
        ),
        (
            "In the evening, {name} knocked at the door with the gift in {his} hands.",
            "All the others brought big gifts, and {name} felt small.",
        ),
        (
            '"This is the best gift of all," said {f_name}, "because you made it for me."',
            "{f_name} loved it so much that {f_he} cried with joy.",
        ),
    ),
    "a wish": (
        (
            "One clear night, {name} saw a star fall from the sky.",
            "One quiet evening, {name} found a small star in the grass.",
        ),
        (
            '"I wish I had {a_thing}," said {name}.',
            '"Make a wish," said the star. "I wish I could {skill}," said {name}.',
        ),
        (
            "The star began to shine, and the wish came true.",
            "There was a flash of light, and then it was quiet.",
        ),
        MEETINGS,
        (
            '"I have a wish too," said {f_name}. "I wish for a friend."',
            '"Now you have what you want," said the {f_kind}. "Are you happy?"',
        ),
        (
            '"I will be your friend," said {name}. "That is a wish that needs no star."',
            "{name} thought for a while. The best wish of all was to have a friend.",
        ),
    ),
    "building something": (
        (
            "One {weather} day, {name} wanted to build a boat.",
            "One {weather} morning, {name} began to build a house out of wood.",
        ),
        (
            "{He} worked all day, but in the evening it fell down.",
            "{He} worked and worked, but the wind blew it away.",
        ),
        MEETINGS,
        (
            '"You need help," said {f_name}. "I will hold it while you work."',
            '"I have {a_thing} and a hammer," said the {f_kind}. "Let me help you."',
        ),
        (
            "Together they worked until it was strong and beautiful.",
            "Now that there were two of them the work was easy, and they sang as they worked.",
        ),
        (
            '"We did it!" said {name}, and they ate {food} to celebrate.',
            "Everybody came to see it, and {f_name} and {name} were proud.",
        ),
    ),
}


def tell_story(cast: Cast, plot: str, rng: Random) -> str:
    """A whole story of one plot: about 90 to 140 words."""
    beats = (OPENINGS, TRAITS, *PLOTS[plot], ENDINGS)
    return _fill(beats, cast, rng)


def tell_short_story(cast: Cast, plot: str, rng: Random) -> str:
    """An opening, the first and the last step of the plot, an ending: four or five sentences."""
    meeting = (MEETINGS,) if MEETINGS in PLOTS[plot] else PLOTS[plot][1:4]
    return _fill((OPENINGS, PLOTS[plot][0], *meeting, PLOTS[plot][-1], ENDINGS), cast, rng)


def tell_long_story(cast: Cast, plots: tuple[str, str], rng: Random) -> str:
    """Two plots one after the other, each with a friend of its own: about 200 words."""
    first = _fill((OPENINGS, TRAITS, *PLOTS[plots[0]], BRIDGES), cast, rng)
    other = replace(cast, friend=draw_person(rng, other_than=cast.hero))
    return f"{first} {_fill((*PLOTS[plots[1]], ENDINGS), other, rng)}"


def _fill(beats: tuple[Beat, ...], cast: Cast, rng: Random) -> str:
    slots = cast.slots()
    return " ".join(rng.choice(beat).format_map(slots) for beat in beats)
