"""The vocabulary of the built-in word problems: names, things, and the moves that make up a story. Data only.

A story is a walk over *states*; a state defines what the running number means (things a person has, a bill, the pages
left to read …). An opening enters a state; a move updates the number and leads to the same or another state. A closing
move leads to `END` and includes its own question; any other story ends with one of its state's `QUESTIONS`.

In a sentence, `{x}` is the running number before the move, `{a}` and `{b}` are numbers drawn for the move, and `{q}` is
how many times b goes into x. Formats: `{b:money}` ($2.50), `{a:word}` (three), `{a:times}` (twice, three times),
`{a:share}` (half, a third). In a rationale, `{expr}` is the annotated calculation.
"""

from dpost_lite.problems import synthetic_measures, synthetic_moves
from dpost_lite.problems.synthetic_words import END

# The smallest and largest number that makes sense in each state; a closing move's result only has to be at least 2.
LIMITS = {
    "have": (3, 400), "stock": (6, 600), "packed": (2, 120), "money": (4, 1500), "bill": (5, 600),
    "minutes": (10, 600), "todo": (4, 900), "distance": (10, 1500), "fuel": (4, 120), "water": (10, 1500),
    "crowd": (8, 900), "compared": (2, 200), "age": (3, 90), "food": (50, 4000), END: (2, 5000),
}  # fmt: skip

# States whose number belongs to the person named last ({who}), not to the one the story opened with ({name}).
PASSED_ON = ("compared", "age")

QUESTIONS = {
    "have": (
        "How many {things} does {name} have now?", "How many {things} does {she} have in the end?",
        "How many {things} are in {name}'s collection now?", "What is the number of {things} {name} has now?",
    ),
    "stock": (
        "How many {things} can {name} sell now?", "How many {things} does {she} have now?",
        "How many {things} are there now?",
    ),
    "packed": ("How many full {packs} does {name} have?", "How many {packs} of {things} does {she} have now?"),
    "money": (
        "How many dollars does {name} have now?", "How much money does {she} have now, in dollars?",
        "How much money does {name} end up with?", "How many dollars does {she} have in the end?",
    ),
    "bill": (
        "How much does {name} pay?", "How many dollars does {she} pay in all?",
        "What is {name}'s total bill, in dollars?",
    ),
    "minutes": (
        "How many minutes does {name} spend in all?", "How long does {she} take altogether, in minutes?",
        "What is {name}'s total time in minutes?",
    ),
    "todo": (
        "How many {things} does {name} still have to {do}?", "How many {things} are left?",
        "How many {things} are left for {name} to {do}?", "How many {things} remain?",
    ),
    "distance": (
        "How many kilometers does {name} {drive} in all?", "What distance does {she} cover, in kilometers?",
        "How far does {name} {drive} altogether, in kilometers?",
    ),
    "fuel": ("How many liters of fuel does {name} need?", "How much fuel does the {vehicle} use, in liters?"),
    "water": (
        "How many liters of water are in the {tank} now?", "How much water does the {tank} hold in the end, in liters?",
        "How many liters are in it now?",
    ),
    "crowd": (
        "How many {people} are there now?", "How many {people} are at the {place} now?",
        "How many {people} does that leave?",
    ),
    "compared": ("How many {things} did {who} {do}?", "What is the number of {things} {who} {did}?"),
    "age": ("How old is {who}?", "What is {who}'s age?", "How many years old is {who}?"),
    "food": (
        "How many grams of {item} does {name} use?", "How much {item} does {she} use in all, in grams?",
        "What is the total weight of {item}, in grams?",
    ),
}  # fmt: skip

MOVES = (*synthetic_moves.MOVES, *synthetic_measures.MOVES)  # the order determines which problems a seed gives
