# ruff: noqa: SIM905 (lists of words read best as words)
"""Requests for stories: who and what a story is about becomes the message that asks for it.

    python examples/stories_requests.py --stories CASED.txt --lower LOWER.txt

prints statistics and samples. Names are also exchanged, all through a story, so that a name is
something to be kept in mind rather than something to be guessed.
"""

import argparse
import random
import re
from collections import Counter

from stories_text import load_stories

from mlx_mcsd.errors import exits_cleanly

USER, ASSISTANT = "<|user|>", "<|assistant|>"

# A message of the assistant ends like a story; there is nobody else to speak, so that what a system
# message says is left out.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}"
    + ASSISTANT
    + "{{ message['content'] | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)

GIRLS = """Lily Anna Mia Lucy Sue Jane Sarah Daisy Sally Sara Molly Jill Amy Lila Emma Mary Jenny
Emily Jen Alice Polly Lisa Rosie Susie Sandy Sophie Bella Elly Betty Kate Annie Ella Nora Ann Tilly
Rachel Lola Cindy Suzy Lilly Mandy Mimi Lulu Luna Millie Julie Clara June Abigail Beth Lizzie Chloe
Emmy Maggie Claire Maddy Tina Olivia Ava Zoe Hannah Ruby Ivy Nina Maya Eva Lea Leah Laura Julia
Sofia Isla Elsa Greta Heidi Ida Iris Jasmine Kim Linda Maria Marta Megan Naomi Paula Penny Pippa
Priya Rita Rosa Ruth Sonia Stella Tess Vera Violet Wendy Willow Yara Zara Amelia Aisha Dora Fiona
Gina Holly Ines Joy Layla Martha Nadia Poppy Sasha Tara Uma Victoria Charlotte Eliza Freya Harper
Kayla Katie Mei Noor Susan Helen Carla Diana Peggy Trudy Dolly Isabella Evelyn Scarlett Madison
Hazel Aurora Savannah Brooklyn Natalie Samantha Aria Elena Sadie Cora Lucia Josie Lena Amber Angela
Barbara Bonnie Carmen Catherine Christine Daphne Dorothy Eleanor Elizabeth Erin Esther Faith Flora
Florence Gloria Hope Jade Jessica Jessie Josephine Judy Karen Kitty Kylie Lara Lydia Mabel Margaret
Matilda Melanie Melissa Mina Miriam Nancy Nelly Nicole Pam Patty Pearl Phoebe Rebecca Robin Rose
Roxy Sabrina Sandra Sharon Skye Summer Sunny Sylvia Tanya Teresa Thea Tracy Ursula Valerie Vicky
Viola Winnie Yasmin Zelda Zoey Coco Ginger Honey Misty Cherry Candy Snowy Fluffy""".split()
BOYS = """Ben Tom Timmy Tim Jack Sam Max Bob John Joe Billy Tommy Benny Jimmy Jake Sammy Pete Andy
Jim Bobby Alex Johnny Peter Toby James Fred Leo Joey Dave George Henry Danny Frank Ted Tony Bill
Freddy Gary Steve Mike Jerry Charlie Josh Todd Larry Ralph Robbie Oliver Noah Lucas Ethan Liam Adam
Alan Arthur Carl Chris Daniel David Dan Eddie Edward Eric Felix Finn Gus Harry Hugo Ian Isaac Ivan
Jacob Jason Jonah Justin Karl Ken Kevin Kai Luke Mark Martin Matt Michael Milo Nathan Ned Nick Oscar
Otto Owen Paul Philip Rob Roger Ron Roy Ryan Scott Simon Stan Theo Thomas Tyler Victor Walter Will
Zack Ali Omar Ravi Diego Mateo Pablo Kenji Amir Hans Emil Anton Ollie Archie Teddy Rocky Rex Buddy
Bruno Rusty William Benjamin Elijah Alexander Mason Logan Jackson Sebastian Aiden Samuel Joseph
Matthew Wyatt Carter Jayden Gabriel Anthony Dylan Grayson Andrew Joshua Christopher Lincoln Caleb
Elias Aaron Adrian Albert Alfie Angus Asher Austin Barney Basil Bert Blake Boris Brad Brian Bruce
Cameron Casey Cole Colin Connor Craig Damian Dennis Derek Dexter Dominic Donald Doug Duncan Dustin
Earl Edgar Elliot Ernie Evan Fabian Ferdinand Fergus Fin Floyd Francis Gavin Gordon Graham Greg
Hank Harvey Hector Herbert Homer Howard Hunter Igor Jasper Jay Jeff Jeremy Jonas Jordan Juan Jude
Julian Kyle Lance Lenny Leon Leonard Levi Lewis Louie Louis Marco Marcus Mario Marvin Miles Monty
Morris Neil Nemo Nigel Norman Orion Parker Patrick Percy Perry Phil Pip Quentin Randy Ray Reggie
Remy Rick Ricky Robert Rodney Rory Ross Rudy Rufus Russell Sean Seth Shane Sid Silas Spencer Spike
Spot Stuart Terry Tobias Trevor Tucker Vincent Wally Warren Wayne Wesley Winston Xavier Zeke Duke
Biscuit Pepper Ziggy Lucky Shadow Whiskers Mittens Buster Bandit Gizmo Fuzzy Bongo
Pickles Waffles Peanut""".split()

# One token each, inside a line and at its beginning: what is one token is easily kept in mind.
NAME_PIECES = [space + name for name in GIRLS + BOYS for space in (" ", "")]

ANIMALS = """dog cat rabbit bunny mouse fox bear squirrel pig horse lion tiger monkey elephant cow
sheep goat deer puppy kitten hedgehog turtle frog bird duck owl fish penguin""".split()

NAMED = re.compile(r"\b(an?|the) ((?:[a-z]+ ){0,3}?[a-z]+) (?:named|called) ([A-Z][a-z]+)\b")
# A noun is what an article leads to and a mark or a small word follows.
THING = re.compile(
    r"\b(?:[Aa]n?|[Tt]he|his|her|their|my|your) (?:[a-z]+ )??([a-z]{3,})(?=[.,!?;:]| (?:and|or|was|"
    r"were|is|are|in|on|to|with|that|had|of|for|at|from|by|so|but|who|said|could|would)\b)"
)
NAME = re.compile(r"\b(?:" + "|".join(GIRLS + BOYS) + r")\b")

SHORTEST = 300  # characters of a story that is told on request

# What every story has says nothing about one.
EVERYWHERE = set(
    """boy girl boys girls mom mommy mum mama dad daddy mother father man woman lady kid kids child
    children day days time times friend friends little big small old new one two other same way
    end house home room thing things lot bit top side next first last best nice good happy sad
    very and was were had has said but that for with from they she her his him him it's were they
    then when who what not all more some too again back front story idea name eyes hand hands face
    head arms morning night family people everyone inside outside their there wanted loved lived
    saw went came started ran played liked asked looked felt decided could would named
    called""".split()
)

WHO = (
    "Tell me a story about {a_kind} named {name}.",
    "Tell me a story about {a_kind} called {name}.",
    "Tell me a story about {name} the {noun}.",
    "Can you tell me a story about {a_kind} named {name}?",
    "Could you write a story about {a_kind} called {name}, please?",
    "Write a story about {a_kind} named {name}.",
    "Please tell me a bedtime story about {a_kind} named {name}.",
    "I want to hear about {a_kind} named {name}.",
    "I would like a story about {a_kind} whose name is {name}.",
    "A story about {a_kind} named {name}, please.",
    "Make up a story about {name}, {a_kind}.",
    "Once more, please: a story about {a_kind} named {name}.",
)
ONE = (
    "Tell me a story about {name}.",
    "Can you tell me a story about {name}?",
    "Write a short story about {name}.",
    "Please tell me a bedtime story about {name}.",
    "I want a story about {name}.",
    "What happened to {name} today?",
    "Tell me about {name}.",
)
TWO = (
    "Tell me a story about {name} and {other}.",
    "Can you tell me a story about {name} and {other}?",
    "Write a story about two friends, {name} and {other}.",
    "I want to hear what {name} and {other} did.",
    "A story with {name} and {other}, please.",
)
ABOUT = (
    "Tell me a story about {a_thing}.",
    "Can you tell me a story about {a_thing}?",
    "Write a story with {a_thing} in it.",
    "Please tell me a bedtime story about {a_thing}.",
    "I want a story about {a_thing} and {a_second}.",
    "Tell me a story about {a_thing} and {a_second}.",
    "Write a story that uses the words {thing} and {second}.",
)
BOTH = (
    "Tell me a story about {name} and {a_thing}.",
    "Write a story about {name} and the {thing}.",
    "Can you tell me a story in which {name} has {a_thing}?",
    "A story about {name} and {a_thing}, please.",
)
WHO_AND_THING = (
    "Tell me a story about {a_kind} named {name} and {a_thing}.",
    "Write a story about {a_kind} called {name}, with {a_thing} in it.",
    "Tell me about {a_kind} named {name} who finds {a_thing}.",
)
FIRST = (
    'Write a story that begins with: "{first}"',
    'Tell me a story that starts like this: "{first}"',
    "Go on with this story: {first}",
    "Continue: {first}",
    "{first}",
    "{opening}",
)
ANY = (
    "Tell me a story.",
    "Tell me a story, please.",
    "Tell me another story.",
    "Can you tell me a story?",
    "I want to hear a story.",
    "Another one, please.",
    "Write a short story.",
    "Please tell me a bedtime story.",
)
TALK = (
    ("Hello!", "Hello! What shall I tell you a story about?"),
    ("Hi", "Hi! Would you like a story? Tell me who it is about."),
    ("Hi there!", "Hi! Tell me a name or a thing, and I will tell you a story about it."),
    ("Good morning", "Good morning! Would you like to hear a story?"),
    ("How are you?", "I am very well, thank you! Would you like to hear a story?"),
    ("Who are you?", "I am a little storyteller. Ask me for a story about a dog named Max!"),
    ("What can you do?", "I can tell little stories. Ask me for one about a cat named Luna!"),
    ("What is your name?", "I have no name. I am only a little storyteller."),
    ("Thank you!", "You are welcome! Would you like another story?"),
    ("Thanks", "You are welcome! Shall I tell you another one?"),
    ("That was a nice story.", "I am glad that you liked it! Would you like another one?"),
    ("Good night", "Good night! Sleep well and have sweet dreams."),
    ("Bye", "Goodbye! Come back for another story soon."),
)

# Sentences of drills. They are about {a}, and {b}.
DRILL_ONE = (
    "This is {a}.",
    "{a} was {a_kind}.",
    "Look, there is {a}!",
    "{a} ran home.",
    "{a} was happy.",
    "{a} saw {a_thing}.",
    "Everybody liked {a}.",
    "Once upon a time, there was {a_kind} named {a}.",
    "One day, {a} found {a_thing}.",
    "What did {a} do?",
    "{a} wanted the {thing}.",
    "{a} smiled.",
    "Then {a} laughed.",
    "So {a} went to sleep.",
    "The {kind} was called {a}.",
    "The name of the {kind} was {a}.",
)
DRILL_TWO = (
    "{a} met {b}.",
    '"Hello, {b}!" said {a}.',
    "{a} and {b} played.",
    "{b} helped {a}.",
    "{a} loved {b}.",
    "{a} asked {b} for the {thing}.",
    '"Thank you, {a}!" said {b}.',
    "{b} was {a}'s friend.",
)
DRILL_THINGS = "ball kite boat cake tree hat key star book".split()


def article(words):
    """``words`` with a or an before it."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def first_sentence(story):
    """A story up to the end of its first sentence."""
    match = re.match(r".+?[.!?][\"']?(?=\s|$)", story, re.S)
    return match.group() if match else None


class Requests:
    """Makes requests and exchanges names, by what a set of stories holds."""

    def __init__(self, stories):
        self.spread, self.stories = Counter(), len(stories)
        self.nameless = []
        for story in stories:
            self.spread.update(set(THING.findall(story)))
            sentences = re.findall(r"[A-Z][^.!?\n\"]+[.!?](?= [A-Z])", story)
            self.nameless += [s for s in sentences if not NAME.search(s)]

    @staticmethod
    def rename(story, rng):
        """Exchange every name of a story for another of its kind, all alike, everywhere in it."""
        taken = {}
        for name in dict.fromkeys(NAME.findall(story)):
            group = GIRLS if name in GIRLS else BOYS
            taken[name] = rng.choice([n for n in group if n not in taken.values()])
        return NAME.sub(lambda match: taken[match.group()], story)

    @staticmethod
    def disguise(story, rng):
        """Make the animal, and now and then the child, that a story introduces another animal."""
        hero = NAMED.search(story[:300])
        noun = hero[2].split()[-1] if hero else None
        chance = 0.4 if noun in ANIMALS else 0.1 if noun in ("boy", "girl") else 0.0
        if rng.random() >= chance:
            return story
        other = rng.choice(ANIMALS)
        return re.sub(rf"\b{noun}(?=s?\b)", other, story)

    def drill(self, rng, far=1.0):
        """Sentences that name one or two over and over: practice in keeping a name in mind.

        Args:
            rng: a ``random.Random``.
            far: from 0, nothing else, to 1, often a few sentences of stories between two of them.

        Returns:
            A document, as of :func:`conversations`.
        """
        a, b = rng.sample(GIRLS + BOYS, 2)
        kind, thing = rng.choice(ANIMALS + ["boy", "girl"] * 5), rng.choice(DRILL_THINGS)
        facts = {"a": a, "b": b, "kind": kind, "a_kind": article(kind)}
        facts |= {"thing": thing, "a_thing": article(thing)}
        two = rng.random() < 0.4
        sentences = rng.choices(DRILL_ONE + DRILL_TWO if two else DRILL_ONE, k=rng.randint(5, 15))
        sentences[0] = rng.choice(DRILL_TWO if two else DRILL_ONE)  # who is asked for is there
        between = far * rng.choice([0.0, 0.3, 0.6])
        words = []
        for sentence in sentences:
            words.append(sentence.format(**facts))
            while self.nameless and rng.random() < between:
                words.append(rng.choice(self.nameless))
        text = " ".join(words)
        if rng.random() < 0.3:
            return text
        request = rng.choice(TWO if two else ONE + WHO)
        return [(request.format(name=a, other=b, noun=kind, **facts), text)]

    def things(self, story):
        """Nouns that a story keeps coming back to and that not every story has."""
        counts = Counter(word for word in THING.findall(story) if word not in EVERYWHERE)
        # Twice where a noun stands; verbs and adjectives rarely do.
        found = [
            word
            for word, count in counts.items()
            if count >= 2 and self.spread[word] < self.stories / 10 and word[-1] != "s"
        ]
        return sorted(found, key=lambda w: (-counts[w], w))[:4]

    def request(self, story, rng):
        """A message that a story answers."""
        facts, kinds = {}, [(ANY, 1)]
        opening = story[:300]
        hero = NAMED.search(opening)
        names = Counter(NAME.findall(story))
        # A name in the request must be in the story, and more than by the way.
        names = [n for n, count in names.items() if count >= 2]
        if hero and story.count(hero[3]) >= 2:
            words = hero[2].split()
            kind = " ".join(words[-rng.randint(1, min(2, len(words))) :])
            facts |= {"name": hero[3], "noun": words[-1], "a_kind": article(kind)}
            kinds += [(WHO, 8), (ONE, 2)]
        elif names:
            facts["name"] = names[0]
            kinds.append((ONE, 4))
        others = [n for n in names if n != facts.get("name")]
        if "name" in facts and others:
            facts["other"] = others[0]
            kinds.append((TWO, 3 if hero is None else 1))
        things = self.things(story)
        if things:
            thing, second = (rng.sample(things, 2) if len(things) > 1 else things * 2)[:2]
            facts |= {
                "thing": thing,
                "second": second,
                "a_thing": article(thing),
                "a_second": article(second),
            }
            kinds.append((ABOUT if len(things) > 1 else ABOUT[:4], 3))
            if "name" in facts:
                kinds.append((BOTH, 2))
            if "a_kind" in facts:
                kinds.append((WHO_AND_THING, 2))
        first = first_sentence(story)
        if first and 15 < len(first) < 200 and '"' not in first:
            words = first.split()
            opening = " ".join(words[: rng.randint(3, max(3, len(words) - 1))])
            facts |= {"first": first, "opening": opening}
            kinds.append((FIRST, 1.5))
        [templates] = rng.choices([t for t, _ in kinds], [w for _, w in kinds])
        text = rng.choice(templates).format(**facts)
        # As people type.
        style = rng.random()
        if style < 0.1 and templates is not FIRST:
            text = text.rstrip(".?").lower() if style < 0.03 else text.rstrip(".?")
        elif style < 0.15 and text.startswith("Tell me a story"):
            text = text.replace("Tell me a story", "Story").rstrip(".")
        return text


def conversations(stories, requests, rng, *, plain, rename, rename_asked):
    """One pass over the stories: some as they are, some as answers in conversations.

    Args:
        stories: texts.
        requests: a :class:`Requests`.
        rng: a ``random.Random``.
        plain: share of stories that nobody asks for.
        rename, rename_asked: share of those and of the others whose names are exchanged.

    Returns:
        A list of documents; each is a text, or a list of (request, reply).
    """
    documents, talk = [], []
    turns = 0
    for story in rng.sample(stories, len(stories)):
        # Some files are cut in pieces, which answer nothing.
        if rng.random() < plain or len(story) < SHORTEST:
            if rng.random() < rename:
                story = requests.rename(story, rng)
            documents.append(story)
            continue
        story = requests.disguise(story, rng)
        if rng.random() < rename_asked:
            story = requests.rename(story, rng)
        if not turns:
            talk, turns = [], rng.choices([1, 2, 3], [75, 20, 5])[0]
            documents.append(talk)
        if rng.random() < 0.03:
            talk.append(rng.choice(TALK))
        talk.append((requests.request(story, rng), story))
        turns -= 1
    return documents


@exits_cleanly
def main(argv=None):
    """Print what the requests look like."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stories", nargs="+", required=True, help="story files with capitals")
    parser.add_argument("--lower", nargs="*", default=[], help="lower-case story files")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    stories, _ = load_stories(args.stories, args.lower)
    requests, rng = Requests(stories), random.Random(args.seed)
    asked = [requests.request(story, rng) for story in stories]
    print(f"{len(stories)} stories, {len(set(asked))} different requests")
    print(f"{sum(bool(NAMED.search(s[:300])) for s in stories)} stories introduce somebody")
    for story in rng.sample(stories, min(args.samples, len(stories))):
        story = requests.rename(story, rng)
        print(f"\n{USER}{requests.request(story, rng)}\n{ASSISTANT}{story[:160]}...")


if __name__ == "__main__":
    main()
