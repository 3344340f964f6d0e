"""One-line jokes made up by rule: `rows("train")` and `rows("test")` give {"text": ...}, the same every time.

Each pun is told in every way, to every listener. Held out by construction: one pun in eight is told in `test` alone, so
what can be learned for it is how such a joke goes, not its point.
"""

from collections.abc import Iterator
from itertools import product

# who, what it does, what it did, and why
PUNS = (
    ("tomato", "turn red", "turned red", "it saw the salad dressing"),
    ("scarecrow", "win a prize", "won a prize", "it was outstanding in its field"),
    ("bicycle", "fall over", "fell over", "it was two tired"),
    ("maths book", "look sad", "looked sad", "it had too many problems"),
    ("cup of coffee", "call the police", "called the police", "it had been mugged"),
    ("golfer", "pack two pairs of trousers", "packed two pairs of trousers", "one had a hole in one"),
    ("computer", "go to the doctor", "went to the doctor", "it had caught a virus"),
    ("banana", "stay at home", "stayed at home", "it was not peeling well"),
    ("biscuit", "stay in bed", "stayed in bed", "it felt crumbly"),
    ("clock", "get sent out of class", "got sent out of class", "it tocked too much"),
    ("bee", "need a bath", "needed a bath", "it had used a honeycomb"),
    ("skeleton", "leave the dance", "left the dance", "it had no body to dance with"),
    ("singer", "climb a ladder", "climbed a ladder", "the notes were so high"),
    ("belt", "go to court", "went to court", "it had held up a pair of trousers"),
    ("picture", "go to jail", "went to jail", "it had been framed"),
    ("calendar", "worry at night", "worried at night", "its days were numbered"),
    ("baker", "get up at four", "got up at four", "there was dough to be made"),
    ("river", "grow rich", "grew rich", "it had two banks"),
    ("oak", "go to the dentist", "went to the dentist", "it needed a root canal"),
    ("pencil", "lose the quarrel", "lost the quarrel", "it had no point"),
    ("broom", "miss the train", "missed the train", "it had overswept"),
    ("mushroom", "get asked to every party", "got asked to every party", "it was a fungi to be with"),
    ("lift", "tell the best jokes", "told the best jokes", "they worked on so many levels"),
    ("egg", "hide in the barn", "hid in the barn", "it was a little chicken"),
    ("herring", "get bad marks", "got bad marks", "its marks were below sea level"),
    ("piano", "wait outside", "waited outside", "it had left its keys inside"),
    ("lamp", "pass every exam", "passed every exam", "it was so bright"),
    ("orange", "stop on the hill", "stopped on the hill", "it ran out of juice"),
    ("farmer", "tell secrets in the field", "told secrets in the field", "the corn was all ears"),
    ("duck", "pay no money", "paid no money", "it put everything on its bill"),
    ("moon", "skip supper", "skipped supper", "it was already full"),
    ("volcano", "say sorry", "said sorry", "it had blown its top"),
    ("stamp", "go far in life", "went far in life", "it stuck to one thing"),
    ("gardener", "give up cooking", "gave up cooking", "there was never enough thyme"),
    ("cheese", "smile", "smiled", "somebody held a camera"),
    ("snowman", "leave the beach", "left the beach", "it was having a meltdown"),
    ("tailor", "stay calm", "stayed calm", "everything hung by a thread anyway"),
    ("sock", "feel lonely", "felt lonely", "its other half was in the wash"),
    ("mirror", "say nothing", "said nothing", "it needed time to reflect"),
    ("kettle", "sing at work", "sang at work", "it had to let off steam"),
    ("candle", "take a holiday", "took a holiday", "it was burnt out"),
    ("door", "see a carpenter", "saw a carpenter", "it had come unhinged"),
    ("frog", "take the bus", "took the bus", "its car had been toad away"),
    ("owl", "throw away the letter", "threw away the letter", "it did not give a hoot"),
    ("loaf", "get up so late", "got up so late", "it took its time to rise"),
    ("teddy bear", "say no to cake", "said no to cake", "it was stuffed"),
    ("wall", "walk to the corner", "walked to the corner", "another wall had said they would meet there"),
    ("grape", "make no fuss", "made no fuss", "it only let out a little wine"),
)

LISTENERS = (
    "aunt", "barber", "boss", "brother", "cousin", "dentist", "grandmother", "guide", "landlord", "neighbour", "nephew",
    "sister", "teacher", "uncle",
)  # fmt: skip

WAYS = (
    "Why did the {who} {do}? Because {why}.",
    "My {listener} asked me why the {who} {did}. I said it was because {why}.",
    "My {listener} knows why the {who} {did}: {why}.",
    '"Why did the {who} {do}?" asked my {listener}. "Because {why}."',
    "So the {who} {did}, and my {listener} was not surprised, since {why}.",
    "Ask my {listener} why the {who} {did}, and you will hear that {why}.",
)


def rows(split: str) -> Iterator[dict[str, str]]:
    """Every joke of one side of the split, once."""
    puns = [pun for number, pun in enumerate(PUNS) if (number % 8 == 7) == (split == "test")]
    texts = (
        way.format(listener=listener, who=who, do=do, did=did, why=why)
        for way, listener, (who, do, did, why) in product(WAYS, LISTENERS, puns)
    )
    yield from ({"text": text} for text in dict.fromkeys(texts))  # the first way has no listener in it
