"""Short tales made up by rule: running text of many kinds, and riddle tales told as an opening and its continuation.

    rows("train", "mixed")     {"text": ...}              tales of twelve plots, one in a hundred of them a riddle tale
    rows("train", "riddle")    {"prompt": ..., "output": ...}   the opening of a riddle tale, and how it goes on

A tale draws a cast, then one wording for each of its sentences. What happens follows from the opening: the riddle has
one answer, and it is the hero's temper, patient or hasty, that decides whether the hero finds it.

Held out by construction: `held_out` parts the pairs of hero and place once, for every kind of tale. Each opening names
both, so no opening of a test tale, nor that pair of hero and place, is met in training.

`random.Random.random` is the one method that Python keeps the same between versions, so all drawing goes through it.
"""

# ruff: noqa: SIM905  lists of words are easier to read and to add to as running text

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

SIZES = {
    ("mixed", "train"): 30_000,
    ("mixed", "test"): 500,
    ("riddle", "train"): 3_000,
    ("riddle", "test"): 200,
}
RIDDLE_SHARE = 0.01  # of the mixed tales

GIRLS = (
    "Ada Agnes Alice Anna Bella Bess Clara Cora Daisy Dora Edith Ella Elsie Emma Flora Greta "
    "Hanna Ida Ivy Jane Julia Kate Lily Lucy Mabel Martha Mary Mina Molly Nell Nora Polly Rosa Ruth Sally Tilda"
).split()
BOYS = (
    "Adam Albert Alfred Arthur Ben Bruno Carl David Edgar Edwin Felix Finn Frank George Gilbert Harry "
    "Henry Hugo Jack Jacob John Jonas Karl Leo Martin Max Ned Oliver Oscar Otto Paul Peter Ralph Robin Simon Tom"
).split()
NAMES = GIRLS + BOYS

PLACES = [
    first + last
    for first in "Alder Amber Apple Ash Birch Briar Clover Elder Fern Fox Hazel Heron Lark Maple Oak Otter Rose Silver "
    "Stone Swan Thorn Willow Winter Wolf".split()
    for last in "brook bury cross dale field ford gate ham haven hill mere moor ton well wick wood".split()
]

TRADES = (
    "baker blacksmith carpenter cobbler cooper dyer farmer fiddler gardener hatter miller pedlar potter saddler "
    "shepherd smith spinner tailor tanner thatcher tinker weaver"
).split()

# what a maker of each trade learns to make
CRAFTS = (
    ("baker", "loaf"), ("blacksmith", "horseshoe"), ("carpenter", "chair"), ("cobbler", "boot"), ("cooper", "barrel"),
    ("hatter", "hat"), ("potter", "jug"), ("saddler", "saddle"), ("tailor", "coat"), ("tinker", "kettle"),
    ("weaver", "shawl"),
)  # fmt: skip

# how a thing may look goes with what it is made of
WARES = (
    ("brass copper little new old round silver small".split(), "box cup flute lamp lantern locket mirror".split()),
    ("brass copper little new old round small tin".split(), "bowl bucket jug kettle pan pitcher teapot".split()),
    ("blue fine green little new old plain red white yellow".split(), "cloak hat purse quilt scarf shawl".split()),
    ("fine little new old painted plain small".split(), "basket drum fiddle ladder pipe saddle whistle".split()),
)
POTS = "bowl bucket jug kettle pan pitcher teapot".split()

BEASTS = (
    "black cat, black crow, black raven, brown bear, brown hare, brown otter, fat badger, fat toad, green frog, "
    "grey donkey, grey goose, grey heron, grey wolf, old goat, old ram, old tortoise, red fox, red hen, red squirrel, "
    "shy deer, small hedgehog, small mouse, speckled thrush, thin weasel, white owl, white swan"
).split(", ")

KIN = {"girl": "sister cousin aunt niece friend".split(), "boy": "brother cousin uncle nephew friend".split()}
PATIENT = "careful patient thoughtful wise".split()
HASTY = "boastful careless hasty proud".split()
SPOTS = "bridge crossroads ferry ford gate mill stile toll-house tower well".split()

# question, answer, and the guess of one who does not stop to think
RIDDLES = (
    ("What has teeth but never bites?", "a comb", "an old dog"),
    ("What has hands but never claps?", "a clock", "a glove"),
    ("What has one eye but cannot see?", "a needle", "a mole"),
    ("What runs all day and never grows tired?", "a river", "a horse"),
    ("What has a neck but no head?", "a bottle", "a goose"),
    ("What climbs to the sky without a ladder?", "the smoke", "a lark"),
    ("What grows wetter the more it dries?", "a towel", "a cloud"),
    ("What has a tongue but never speaks?", "a shoe", "a fish"),
    ("What has leaves but is not a tree?", "a book", "a bush"),
    ("What walks beside you all day and hides at night?", "a shadow", "a dog"),
    ("What must be broken before it is used?", "an egg", "a young horse"),
    ("What howls at the door but has no mouth?", "the wind", "a wolf"),
    ("What grows shorter the longer it shines?", "a candle", "the moon"),
    ("What calls the whole village but has no voice?", "a bell", "a rooster"),
    ("What builds a house out of thread?", "a spider", "a tailor"),
    ("What carries its house on its back?", "a snail", "a pedlar"),
    ("What wears a red coat and has a stone for a heart?", "a cherry", "a king"),
    ("What gets bigger the more you take away?", "a hole", "a debt"),
    ("What is small enough for a pocket and opens the biggest door?", "a key", "a gold coin"),
    ("What weeps without any eyes?", "a cloud", "an onion"),
)

Sentence = tuple[str, ...]  # the wordings it may take

RIDDLE_OPENING: tuple[Sentence, ...] = (
    (
        "{name}, {a_temper} {trade}, was taking {a_thing} to {his} {kin} {friend} in {place}.",
        "There once was {a_temper} {trade}, {name}, who set out for {place} with {a_thing} for {his} {kin} {friend}.",
        "One morning {name}, {a_temper} {trade}, left for {place} with {a_thing} for {his} {kin} {friend}.",
    ),
    (
        "At the {spot} sat {a_beast}.",
        "By the {spot} {he} met {a_beast}.",
        "{A_beast} kept the {spot} on the way.",
    ),
    (
        '"{question}" asked the {animal}. "Answer me, or leave me the {noun}."',
        '"Guess my riddle, or the {noun} is mine," said the {animal}. "{question}"',
        '"Nobody passes without an answer," said the {animal}. "{question}"',
    ),
)

RIDDLE_WON: tuple[Sentence, ...] = (
    (
        "{name} put down the {noun} and thought for a long while.",
        "{name} sat in the grass beside the {animal} and did not hurry.",
        "{name} looked at the {animal}, and then at the sky, and thought.",
    ),
    (
        '"It is {answer}," {he} said at last.',
        'At last {he} smiled. "It must be {answer}," said {name}.',
    ),
    (
        '"That is right," said the {animal}, and let {name} pass the {spot}.',
        'The {animal} bowed. "You may pass the {spot}, {name}, and keep your {noun}."',
        "The {animal} laughed with joy, for nobody had ever guessed it, and {name} passed the {spot}.",
    ),
    (
        "Before dark {name} reached {place} and gave the {thing} to {friend}.",
        "That evening in {place} {he} put the {thing} into the hands of {friend}.",
        "So the {thing} came safely to {place}, and {friend} was glad of it.",
    ),
    (
        "{friend} asked to hear the riddle again and again, and {name} told it gladly.",
        "Then {name} and {friend} sat by the fire and made riddles until midnight.",
        "To this day {friend} thanks {name} and the {animal} at the {spot}.",
    ),
)

RIDDLE_LOST: tuple[Sentence, ...] = (
    (
        '{name} did not stop to think. "It is {guess}!" {he} cried.',
        '"That is easy," laughed {name}. "It is {guess}!"',
        '"I know it, I know it!" shouted {name}. "It is {guess}!"',
    ),
    (
        '"No, {name}," said the {animal}. "It is {answer}."',
        'The {animal} shook its head. "It is {answer}, {name}."',
        '"Wrong," said the {animal}, "for it is {answer}."',
    ),
    (
        "Then the {animal} took the {thing} and was gone from the {spot}.",
        "So {name} had to leave the {thing} with the {animal} at the {spot}.",
        "And the {thing} stayed at the {spot} with the {animal}.",
    ),
    (
        "{name} came to {place} with empty hands and told {friend} everything.",
        "When {he} reached {place}, {name} had nothing to give to {friend}.",
        "That night in {place} {friend} waited for a gift, but {name} had none.",
    ),
    (
        '"Next time, think before you speak," said {friend}, and {name} promised it.',
        'But {friend} only smiled and said, "Now, {name}, you have learned to think first."',
        "From that day on {name} thought twice before {he} answered, and {friend} was glad.",
    ),
)

LOST: tuple[Sentence, ...] = (
    (
        "{name} lived in {place} and owned {a_thing}.",
        "In {place} there lived {a_trade} called {name}, who loved {his} {thing} above all things.",
        "{name} of {place} had {a_thing}, a gift from {his} {kin} {friend}.",
    ),
    (
        "One day the {noun} was gone.",
        "But one windy morning {name} could not find the {noun} anywhere.",
        "One evening {name} came home and saw that the {noun} was missing.",
    ),
    (
        "{He} looked under the bed, behind the door and in the well.",
        "{name} asked at every house in {place}, but nobody had seen it.",
        '"Where is my {noun}?" cried {name}, and {he} ran through all of {place}.',
    ),
    (
        "Then {friend} came from the {spot} and said that {a_beast} was there.",
        'Then {friend} called, "{name}, I saw {a_beast} by the {spot}!"',
        "{friend} helped {him} look, and at the {spot} they met {a_beast}.",
    ),
    (
        "And there lay the {thing}, safe in the grass beside the {animal}.",
        "The {animal} was sitting on the {thing} and would not move for anyone but {name}.",
        "There by the {spot} the {animal} had kept the {thing} warm and dry.",
    ),
    (
        "{name} gave the {animal} some bread and took it back to the {spot}.",
        '"Thank you, {friend}," said {name}, and from then on {he} looked after the {noun} well.',
        "So {name} had {his} {noun} again, and the {animal} came to {place} every day.",
    ),
)

JOURNEY: tuple[Sentence, ...] = (
    (
        "{name} lived in {home} and had never been to {place}.",
        "{name} of {home} wished to see {his} {kin} {friend}, who lived far away in {place}.",
        'One spring {name} said, "I will leave {home} and walk to {place}."',
    ),
    (
        "{He} packed some bread and {a_thing} and took the road over the hills.",
        "{name} put on {his} boots, took {a_thing} under one arm, and shut the door.",
        "With {a_thing} on {his} back {he} walked out of {home}.",
    ),
    (
        "On the first day it rained, and {name} slept under a tree.",
        "For two days {name} saw nobody but {a_beast}.",
        "At the {spot} {a_beast} showed {him} the right road.",
    ),
    (
        "On the third day {name} was so tired that {he} sat down and wept.",
        'On the second night {name} thought, "I will never see {place}."',
        "When the road parted, {name} did not know which way to go.",
    ),
    (
        "But {friend} had come from {place} to meet {him}, and carried the {noun} the rest of the way.",
        "But then {he} saw the lights of {place}, and {friend} stood at the gate.",
        'Then somebody called, "{name}, this way!" and it was {friend}.',
    ),
    (
        "In {place} {name} gave the {thing} to {friend}, and they ate supper together.",
        "{name} stayed in {place} until the summer, and {friend} kept the {noun} by the window.",
        '"Now I have seen {place}," said {name}, and {friend} laughed.',
    ),
)

BARGAIN_FAIR: tuple[Sentence, ...] = (
    (
        "{name}, {a_patient} {trade}, went to the market of {place} to sell {a_thing}.",
        "On market day {a_patient} {trade} called {name} brought {a_thing} to {place}.",
        "{name} was {a_patient} {trade} who wanted to sell {a_thing} at {place}.",
    ),
    (
        '"How much is the {noun}?" asked {friend}, who stood in the crowd.',
        "A young woman and an old man looked at the {noun}, but only {friend} wished to buy it.",
        "{friend} came and turned the {noun} round and round.",
    ),
    (
        '"Two coins," said {name}, "for that is what I paid."',
        '"One coin and a loaf of bread," said {name}.',
        "{name} showed {friend} every fault in it and asked for a fair price.",
    ),
    (
        '"You are honest, {name}," said {friend}, and paid at once.',
        "{friend} paid gladly and carried the {thing} home.",
        '"Here is one coin more, {name}, for telling the truth," said {friend}.',
    ),
    (
        "Soon all of {place} knew that one could trust {name}.",
        "From that day on {friend} sent everyone in {place} to {name}.",
        "And {name} went home from {place} with a full purse and a light heart.",
    ),
)

BARGAIN_GREEDY: tuple[Sentence, ...] = (
    (
        "{name}, {a_hasty} {trade}, went to the market of {place} to sell {a_thing}.",
        "On market day {a_hasty} {trade} called {name} brought {a_thing} to {place}.",
        "{name} was {a_hasty} {trade} who wanted to sell {a_thing} at {place}.",
    ),
    (
        '"How much is the {noun}?" asked {friend}, who stood in the crowd.',
        "A young woman and an old man looked at the {noun}, but only {friend} wished to buy it.",
        "{friend} came and turned the {noun} round and round.",
    ),
    (
        '"A hundred coins!" said {name}. "There is none better in the world."',
        '"It once belonged to a queen," said {name}, and that was not true.',
        "{name} laughed and asked for ten times what it was worth.",
    ),
    (
        'But {friend} shook {fhis} head. "Then keep it, {name}," {fhe} said.',
        "{friend} put the {thing} down and walked away.",
        '"I would rather buy {a_beast}," said {friend}, and did so.',
    ),
    (
        "At night {name} had to carry the {thing} home from {place} again.",
        "Nobody else in {place} wanted the {thing}, and {name} went home without a coin.",
        "And {name} sat in {place} with the {noun} until the rain came.",
    ),
)

STORM: tuple[Sentence, ...] = (
    (
        "{name} and {friend} sailed from {place} in a small boat.",
        "One summer {name} of {place} went to sea, and {his} {kin} {friend} went too.",
        "From the harbour of {place} {name} rowed out to fish with {friend}.",
    ),
    (
        "They had only a net, some bread and {a_pot} with them.",
        "{friend} held the oars, and {name} held {a_pot}.",
        "In the boat lay {a_pot}, which belonged to {friend}.",
    ),
    (
        "At noon the sky turned black, and the waves grew as high as houses.",
        'Then the wind began to howl. "Hold fast, {name}!" cried {friend}.',
        "Soon a great storm broke, and the sail was torn.",
    ),
    (
        "The boat was filling with water, but {name} used the {pot} to throw it out again.",
        "A wave took the {pot}, and then it took {friend}, but {name} caught {fhim} by the sleeve.",
        '"We shall never see {place} again," wept {friend}, but {name} sang to keep {fhim} brave.',
    ),
    (
        "In the morning the sea was calm, and {name} saw the roofs of {place}.",
        "All night {name} and {friend} rowed, and at dawn they were back in {place}.",
        "Then the moon came out and showed {name} and {friend} the way to {place}.",
    ),
    (
        "{friend} hung the {pot} over the door, so that nobody would forget that night.",
        "All of {place} came to the shore, and {friend} told them how brave {name} had been.",
        'And {name} said to {friend}, "Tomorrow we shall stay at home."',
    ),
)

HELPER: tuple[Sentence, ...] = (
    (
        "Near {place} {name} the {trade} found {a_beast} caught in a trap.",
        "{name}, {a_trade} from {place}, once met {a_beast} that had hurt its foot.",
        "One winter {a_beast} came to the house of {name} in {place}, cold and hungry.",
    ),
    (
        '"Help me, {name}," said the {animal}, "and I will help you one day."',
        "{name} took pity on the {animal} and gave it milk.",
        "{name} set the {animal} by the fire until it was well.",
    ),
    (
        "A year later {name} lost {his} way in the forest.",
        "In the spring a thief stole {a_thing} from {name}.",
        "Soon after, {name} fell into a deep well.",
    ),
    (
        '"Will nobody help me?" cried {name}, and who should come but the {animal}!',
        "Then the {animal} remembered {name} and came running.",
        "Far away the {animal} heard {name} weep.",
    ),
    (
        "The {animal} ran to {place} and fetched {friend}, and all was well.",
        "The {animal} called {friend}, and {friend} came from {place} with a rope and a light.",
        '"Follow me," said the {animal}, and it led {name} and {friend} straight to the right spot.',
    ),
    (
        'So {name} and the {animal} were friends, and {friend} said, "No kindness is ever lost."',
        "{name} thanked {friend}, but most of all {he} thanked the {animal}.",
        "And nobody in {place} ever set a trap for {a_animal} again.",
    ),
)

QUARREL: tuple[Sentence, ...] = (
    (
        "{name} and {friend} of {place} were the best of friends until they quarrelled over {a_thing}.",
        "In {place} {name} and {friend} once found {a_thing} on the road.",
        "{name} lived next door to {friend} in {place}, and between the two houses lay {a_thing}.",
    ),
    (
        '"The {noun} is mine," said {name}. "No, it is mine," said {friend}.',
        "{name} pulled the {noun} one way, and {friend} pulled it the other way.",
        '"You may not touch the {noun}, {friend}," said {name}, and {friend} grew angry.',
    ),
    (
        "For a week {name} did not speak to {friend}, and {friend} did not speak to {name}.",
        "{friend} went home and shut the door, and {name} sat alone by the {spot}.",
        "They shouted so loudly that all of {place} could hear {name} and {friend}.",
    ),
    (
        "Then {a_beast} came from the {spot} and carried the {noun} away.",
        "But while they quarrelled, {a_beast} ran off with the {noun}.",
        'Then {a_beast} looked at them and said, "A {noun} is not worth a friend."',
    ),
    (
        "{name} looked at {friend}, and {friend} looked at {name}, and both began to laugh.",
        '"I am sorry, {friend}," said {name}. "So am I, {name}," said {friend}.',
        "That night {name} knocked at the door of {friend} and asked {fhim} to forgive {him}.",
    ),
    (
        "After that they often sat by the {spot} and talked.",
        "Since then {name} and {friend} share all that they have in {place}.",
        "And nobody in {place} ever heard {name} and {friend} quarrel again.",
    ),
)

LEARNER: tuple[Sentence, ...] = (
    (
        "{name} wanted to become {a_maker}, so {he} went to {friend} in {place}.",
        "In {place} lived {friend} the {maker}, and one day {name} came to learn from {fhim}.",
        "{friend}, the best {maker} in {place}, took {name} into {fhis} house to teach {him}.",
    ),
    (
        '"First you must make {a_work}," said {friend}.',
        "For a whole year {name} only swept the floor and never made {a_work}.",
        "On the first day {name} spoiled {a_work}, and {friend} sighed.",
    ),
    (
        "{name} tried once, and twice, and three times.",
        '"I shall never be {a_maker}," said {name}. "Try again," said {friend}.',
        "Every night {name} worked by a candle, while {friend} slept.",
    ),
    (
        "At last {friend} looked at the {work} and smiled.",
        "One morning {name} put a new {work} on the table, and {friend} could find no fault in it.",
        'At last {friend} took the {work} in {fhis} hands. "This is good work, {name}," {fhe} said.',
    ),
    (
        "Now {name} is the {maker} of {place}, and {friend} sits in the sun.",
        '"Now {place} has two of us," said {friend} to {name}, and gave {him} {fhis} own tools.',
        "And when {friend} grew old, {name} was {a_maker} whom all of {place} praised.",
    ),
)

FEAST: tuple[Sentence, ...] = (
    (
        "{name} wished to give a feast for all of {place}.",
        "It was the birthday of {friend}, and {name} wanted to bake the biggest cake in {place}.",
        "When the harvest was in, {place} held a feast, and {name} was to cook.",
    ),
    (
        "But {name} had only {a_pot}, two eggs and a little flour.",
        "{friend} brought {a_pot}, and a neighbour brought apples.",
        '"What can I bring?" asked {friend}. "Bring your {pot}," said {name}.',
    ),
    (
        "While {name} slept, {a_beast} came in and ate the cake.",
        "{name} stirred and stirred, and {a_beast} watched through the window.",
        "Just then {a_beast} jumped on the table, and everything fell down.",
    ),
    (
        '"Now there is nothing left," wept {name}, but {friend} went from house to house and asked for help.',
        "Then {friend} had a good thought, and whispered it to {name}.",
        '"Never mind, {name}," said {friend}. "We shall share what we have."',
    ),
    (
        "So everyone in {place} gave a little, and {friend} filled the {pot} with soup.",
        "{name} put the {pot} on the fire, and soon it smelled so good that all of {place} came.",
        "All of {place} came and danced, and {friend} beat time on the {pot}.",
    ),
    (
        "Even the {animal} got a plate, and {name} laughed.",
        '"It was the best feast that {place} ever had," said {friend} to {name}.',
        "{name} and {friend} danced until the morning, and the {animal} danced with them.",
    ),
)

GREETINGS: tuple[Sentence, ...] = (
    (
        "{name} was sent to {place} to greet {folk}.",
        "It was the day of the fair in {place}, and {name} had to invite {folk}.",
        'Before {name} left for {place}, {friend} said, "Greet {folk} for me."',
    ),
    (
        'All the way {name} said, "{folk}", so as not to forget.',
        '"{folk}," sang {name} on the road. "{folk}."',
        '{He} walked and whispered, "{folk}."',
    ),
    (
        "At the {spot} {a_beast} ran over the road, and {name} forgot every one.",
        "At the {spot} {name} fell down, and all the names were gone.",
        'At the {spot} {a_beast} asked, "Whom do you look for?" and {name} could not say.',
    ),
    (
        'Then {he} heard somebody sing, "{folk}," and it was {friend}.',
        '{friend} called after {him}, "{folk}!"',
        'But the wind had heard it too, and it whispered, "{folk}."',
    ),
    (
        "So {name} left the {spot}, came to {place} and greeted {folk}.",
        "And {folk} of {place} were all glad to see {name}.",
        "In {place} {name} knocked at every door until {he} had found {folk}.",
    ),
)

SHOPPING: tuple[Sentence, ...] = (
    (
        "{name} went to {place} to buy {goods}.",
        '"Go to {place}, {name}," said {friend}, "and bring me {goods}."',
        "In {place} {friend} sold {goods}, and one day {name} came to the shop.",
    ),
    (
        '"{Goods}," said {name} at every step.',
        '"{Goods}," {he} sang, "and then I am rich!"',
        '{He} wrote on a leaf, "{Goods}."',
    ),
    (
        "On the way {a_beast} laughed at {him}.",
        "At the {spot} {name} stopped to drink.",
        "It was a hot day, and the road was long.",
    ),
    (
        '"What do you want?" asked {friend}. "{Goods}," said {name}.',
        '"I have {goods}," said {friend}. "That is all that I need," said {name}.',
        '"Was it {goods}?" asked {friend}, and {name} said yes.',
    ),
    (
        "So {name} came home from {place} with {goods}.",
        "And {name} carried {goods} all the way from {place}.",
        "That evening {friend} and {name} laid {goods} on the table in {place}.",
    ),
)

SCHOOL: tuple[Sentence, ...] = (
    (
        "{friend} kept the school of {place}, and {name} sat in the first row.",
        "On winter evenings {name} and {friend} of {place} sat by the stove.",
        "{name} of {place} liked to ask hard things, and {friend} liked to answer them.",
    ),
    (
        '"{question}" asked {friend}. "It is {answer}," said {name}.',
        '"{question}" asked {name}. "It must be {answer}," said {friend}.',
        '{name} asked {friend}, "{question}" The answer was {answer}.',
    ),
    (
        '"{question2}" asked {friend}. "It is {answer2}," said {name}.',
        '"{question2}" asked {name}. "It must be {answer2}," said {friend}.',
        '{name} asked {friend}, "{question2}" The answer was {answer2}.',
    ),
    (
        "So they learned something every day in {place}.",
        'And {friend} said, "Nobody in {place} is as clever as {name}."',
        "Then {name} and {friend} laughed and went to bed.",
    ),
)

PLOTS = (
    GREETINGS,
    SCHOOL,
    SHOPPING,
    LOST,
    JOURNEY,
    BARGAIN_FAIR,
    BARGAIN_GREEDY,
    STORM,
    HELPER,
    QUARREL,
    LEARNER,
    FEAST,
)


def rows(split: str, kind: str = "riddle") -> Iterator[dict[str, str]]:
    """All rows of one kind ("mixed", "riddle") and split ("train", "test"), the same every time, in the same order."""
    rng = random.Random(f"tales/{kind}/{split}")
    for _ in range(SIZES[kind, split]):
        if kind == "riddle":
            opening, continuation = riddle(rng, split)
            yield {"prompt": opening, "output": continuation}
        elif rng.random() < RIDDLE_SHARE:
            yield {"text": " ".join(riddle(rng, split))}
        else:
            yield {"text": tell(rng, draw(rng, PLOTS), cast(rng, split))}


def riddle(rng: random.Random, split: str) -> tuple[str, str]:
    """A riddle tale: its opening, and the continuation that follows from the riddle and from the hero's temper."""
    patient = rng.random() < 0.5
    told = cast(rng, split) | {"a_temper": a(draw(rng, PATIENT if patient else HASTY))}
    return tell(rng, RIDDLE_OPENING, told), tell(rng, RIDDLE_WON if patient else RIDDLE_LOST, told)


def held_out(name: str, place: str) -> bool:
    """Whether tales of this hero at this place are kept for the test: one pair in eight."""
    return (NAMES.index(name) + PLACES.index(place)) % 8 == 0


def cast(rng: random.Random, split: str) -> dict[str, str]:
    """Everyone and everything that a tale may name, by the field that stands for it in the wordings."""
    name, place = draw(rng, NAMES), draw(rng, PLACES)
    while held_out(name, place) != (split == "test"):
        name, place = draw(rng, NAMES), draw(rng, PLACES)
    friend, *others = several(rng, [other for other in NAMES if other != name], 5)
    home = draw(rng, [other for other in PLACES if other != place])
    looks, nouns = draw(rng, WARES)
    look, noun, pot, beast = draw(rng, looks), draw(rng, nouns), draw(rng, POTS), draw(rng, BEASTS)
    trade, (maker, work) = draw(rng, TRADES), draw(rng, CRAFTS)
    goods = listed([a(f"{draw(rng, looks)} {draw(rng, nouns)}") for looks, nouns in WARES])
    (question, answer, guess), (question2, answer2, _) = several(rng, RIDDLES, 2)
    he, his, him = ("she", "her", "her") if name in GIRLS else ("he", "his", "him")
    fhe, fhis, fhim = ("she", "her", "her") if friend in GIRLS else ("he", "his", "him")
    animal = beast.split()[-1]
    return {
        "name": name, "he": he, "his": his, "him": him, "He": he.capitalize(),
        "friend": friend, "fhe": fhe, "fhis": fhis, "fhim": fhim,
        "kin": draw(rng, KIN["girl" if friend in GIRLS else "boy"]),
        "place": place, "home": home, "spot": draw(rng, SPOTS),
        "noun": noun, "thing": f"{look} {noun}", "a_thing": a(f"{look} {noun}"),
        "animal": animal, "a_animal": a(animal), "a_beast": a(beast), "A_beast": a(beast).capitalize(),
        "pot": pot, "a_pot": a(pot), "work": work, "a_work": a(work),
        "trade": trade, "a_trade": a(trade), "maker": maker, "a_maker": a(maker),
        "question": question, "answer": answer, "guess": guess, "question2": question2, "answer2": answer2,
        "folk": listed(others), "goods": goods, "Goods": goods.capitalize(),
        "a_patient": a(draw(rng, PATIENT)), "a_hasty": a(draw(rng, HASTY)),
    }  # fmt: skip


def tell(rng: random.Random, plot: Sequence[Sentence], told: dict[str, str]) -> str:
    return " ".join(draw(rng, sentence).format(**told) for sentence in plot)


def draw(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def several(rng: random.Random, items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, each at most once."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
