"""The vocabulary of the built-in word problems: names, things, and the moves that make up a story. Data only.

A story is a walk over *states*; a state defines what the running number means (things a person has, a bill, the pages
left to read …). An opening enters a state; a move updates the number and leads to the same or another state. A closing
move leads to `END` and includes its own question; any other story ends with one of its state's `QUESTIONS`.

In a sentence, `{x}` is the running number before the move, `{a}` and `{b}` are numbers drawn for the move, and `{q}` is
how many times b goes into x. Formats: `{b:money}` ($2.50), `{a:word}` (three), `{a:times}` (twice, three times),
`{a:share}` (half, a third). In a rationale, `{expr}` is the annotated calculation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

END = "end"
START = "start"


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """One step of a story: a calculation, with alternative wordings for the question and for the rationale.

    The formula "a" just states a number, so it has no rationale. `scenes` are the word sets an opening chooses from.
    """

    start: str
    end: str
    formula: str
    sentences: tuple[str, ...]
    rationales: tuple[str, ...] = ()
    a: Sequence[int | Fraction] = (0,)
    b: Sequence[int | Fraction] = (0,)
    scenes: tuple[dict[str, str], ...] = ({},)


def _scenes(fields: str, rows: str) -> tuple[dict[str, str], ...]:
    """Return one dict per row; rows are separated by `;`, words by `,`."""
    return tuple(dict(zip(fields.split(), row.strip().split(","), strict=True)) for row in rows.split(";"))


GIRLS = (  # noqa: SIM905
    "Ada Alice Amara Anna Aisha Bella Bianca Carla Chloe Clara Daisy Diana Elena Ella Emma Esther Fatima Fiona Freya "
    "Grace Hana Hazel Helen Ines Iris Isla Ivy Jana Julia Kara Keiko Laila Lena Lucy Maya Mei Mia Mira Nadia Nina Nora "
    "Olga Olivia Paula Priya Rosa Ruth Sara Sofia Tara Vera Wendy Yara Zoe"
).split()
BOYS = (  # noqa: SIM905
    "Adam Ahmed Alan Anton Arjun Ben Boris Bruno Carlos Chen Daniel David Diego Elias Emil Ethan Felix Finn Frank "
    "George Hassan Henry Hugo Ian Isaac Ivan Jack Jamal James Jonas Kai Kenji Kofi Leo Liam Luca Marco Martin Max Milo "
    "Nathan Noah Omar Oscar Pablo Peter Ravi Ryan Samuel Theo Tomas Victor Yusuf Zane"
).split()
KIN = ("brother", "sister", "mother", "father", "cousin", "uncle", "aunt", "grandmother", "grandfather", "neighbor")

COLLECTIBLES = _scenes(
    "thing things packs pack",
    "marble,marbles,bags,bag; sticker,stickers,sheets,sheet; stamp,stamps,sets,set; bead,beads,jars,jar; "
    "trading card,trading cards,packs,pack; postcard,postcards,sets,set; toy car,toy cars,boxes,box; "
    "button,buttons,bags,bag; badge,badges,packs,pack; crayon,crayons,boxes,box; magnet,magnets,sets,set; "
    "balloon,balloons,packs,pack; building block,building blocks,tubs,tub; ribbon,ribbons,rolls,roll",
)
BAKED = _scenes(
    "thing things packs pack",
    "muffin,muffins,boxes,box; cookie,cookies,tins,tin; cupcake,cupcakes,boxes,box; bagel,bagels,bags,bag; "
    "doughnut,doughnuts,boxes,box; pretzel,pretzels,bags,bag; brownie,brownies,trays,tray",
)
PICKED = _scenes(
    "thing things packs pack plant plants",
    "apple,apples,crates,crate,tree,trees; pear,pears,baskets,basket,tree,trees; "
    "lemon,lemons,bags,bag,tree,trees; tomato,tomatoes,boxes,box,plant,plants; "
    "pumpkin,pumpkins,carts,cart,vine,vines; rose,roses,bunches,bunch,bush,bushes; "
    "pepper,peppers,bags,bag,plant,plants",
)
CRAFTED = _scenes(
    "thing things packs pack",
    "candle,candles,boxes,box; bracelet,bracelets,cases,case; mug,mugs,crates,crate; scarf,scarves,bags,bag; "
    "bar of soap,bars of soap,gift sets,gift set; toy boat,toy boats,boxes,box; lamp,lamps,crates,crate; "
    "birdhouse,birdhouses,crates,crate; wallet,wallets,cases,case; basket,baskets,stacks,stack",
)
EGGS = _scenes(
    "thing things packs pack",
    "egg,eggs,cartons,carton",
)
BOUGHT = _scenes(
    "thing things other",
    "notebook,notebooks,a pencil case; T-shirt,T-shirts,a belt; plant,plants,a watering can; "
    "plate,plates,a vase; book,books,a bookmark set; towel,towels,a bath mat; sandwich,sandwiches,a salad; "
    "chair,chairs,a small rug; pair of socks,pairs of socks,a hat; paint tube,paint tubes,a brush; "
    "board game,board games,a poster",
)
TASKS = _scenes(
    "goal things do does",
    "a book,pages,read,reads; a crate,bottles,label,labels; a wall,bricks,lay,lays; an essay,words,write,writes; "
    "a quilt,patches,sew,sews; a fence,boards,paint,paints; a list,exercises,solve,solves; "
    "a stack,letters,stamp,stamps; a field,seedlings,plant,plants; a folder,photos,sort,sorts",
)
PRACTICE = _scenes(
    "practises activity extra",
    "practices,the piano,scales; practices,the guitar,chords; trains,for a race,stretching; "
    "studies,for a test,flash cards; works,on a model ship,painting; rehearses,for a play,songs",
)
DEEDS = _scenes(
    "things did do",
    "points,scored,score; fish,caught,catch; books,read,read; laps,swam,swim; trees,planted,plant; "
    "photos,took,take; shells,found,find; tickets,sold,sell; cards,collected,collect; miles,ran,run",
)
VEHICLES = _scenes(
    "drives vehicle drive",
    "drives,car,drive; drives,van,drive; rides,motorbike,ride; drives,truck,drive",
)
TANKS = _scenes(
    "tank",
    "tank; pool; barrel; pond; cistern",
)
CROWDS = _scenes(
    "people place",
    "passengers,station; visitors,museum; guests,hotel; children,playground; dancers,festival; students,library; "
    "fans,stadium; people,theater",
)
DISHES = _scenes(
    "dish dishes item",
    "cake,cakes,sugar; loaf,loaves,flour; pizza,pizzas,cheese; pie,pies,butter; batch,batches,rice",
)

SMALL, MEDIUM, LARGE = range(2, 10), range(5, 31), range(20, 121)
PER_CENT = (10, 20, 25, 30, 40, 50, 60, 75, 80)
SHARES = (2, 3, 4, 5)
PRICES = (*range(2, 16), Fraction(3, 2), Fraction(5, 2), Fraction(7, 2), Fraction(9, 2))
ROUND = tuple(range(100, 1000, 20))

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

MOVES = (
    # A collection: things that a person has.
    Move(START, "have", "a", a=range(12, 97), scenes=COLLECTIBLES, sentences=(
        "{name} has {a} {things}.", "{name} owns {a} {things}.", "There are {a} {things} in {name}'s collection.",
        "{name} finds {a} {things} in the attic and keeps them.",)),
    Move(START, "have", "a*b", a=SMALL, b=range(4, 25), scenes=COLLECTIBLES, sentences=(
        "{name} buys {a:word} {packs} of {b} {things}.", "{name} has {a} {packs} with {b} {things} in each.",
        "Each of {name}'s {a} {packs} holds {b} {things}.", "{name} gets {a:word} {packs}, each with {b} {things}."),
        rationales=("{name} has {expr} {things}.", "The {packs} hold {expr} {things}.")),
    Move(START, "have", "a+b", a=range(8, 60), b=range(8, 60), scenes=COLLECTIBLES, sentences=(
        "{name} has {a} red {things} and {b} blue ones.", "{name} keeps {a} {things} at home and {b} more at school.",
        "{name} got {a} {things} on Monday and {b} {things} on Tuesday."),
        rationales=("{name} has {expr} {things}.", "Together that is {expr} {things}.")),
    Move("have", "have", "x+a", a=MEDIUM, sentences=(
        "{She} finds {a} more {things}.", "{Her} {kin} gives {him} {a} more {things}.",
        "Then {she} buys {a} more {things}.",
        "{name} wins {a} more {things} in a game.", "On {her} birthday {she} gets {a} more {things}."),
        rationales=("Now {name} has {expr} {things}.", "With {a} more, that makes {expr} {things}.")),
    Move("have", "have", "x+a*b", a=SMALL, b=range(3, 13), sentences=(
        "{She} buys {a:word} more {packs} of {b} {things}.", "Then {she} gets {a} new {packs} with {b} {things} each.",
        "{Her} {kin} gives {him} {a:word} more {packs} of {b} {things}."),
        rationales=("With the new {packs}, {she} has {expr} {things}.", "{name} now has {expr} {things}.")),
    Move("have", "have", "x-a", a=MEDIUM, sentences=(
        "{She} gives {a} {things} to {friend}.", "{name} loses {a} {things} on the way to school.",
        "Then {she} throws away {a} old {things}.", "{Her} {kin} takes {a} of the {things}.",
        "{She} swaps {a} of the {things} for a comic book."),
        rationales=("Then {expr} {things} are left.", "{name} keeps {expr} {things}.")),
    Move("have", "have", "x-a*b", a=SMALL, b=range(2, 9), sentences=(
        "{She} gives {b} {things} to each of {a} friends.", "Each of {her} {a:word} cousins takes {b} {things}.",
        "Every day for {a:word} days {she} gives away {b} {things}."),
        rationales=("After that, {expr} {things} are left.", "{name} has {expr} {things} left.")),
    Move("have", "have", "x-x/a", a=SHARES, sentences=(
        "{She} gives {a:share} of {her} {things} to {friend}.", "{name} loses {a:share} of the {things}.",
        "Then {she} donates {a:share} of the {things}."),
        rationales=("Without {a:share} of them, {expr} {things} are left.", "{She} still has {expr} {things}.")),
    Move("have", "have", "x-x*a/100", a=PER_CENT, sentences=(
        "{She} gives away {a}% of {her} {things}.", "{name} trades away {a}% of the {things} for a book.",
        "Then {she} sends {a}% of the {things} to {friend}."),
        rationales=("After {a}% are gone, {expr} {things} are left.", "{name} keeps {expr} {things}.")),
    Move("have", "have", "x*a", a=(2, 3, 4), sentences=(
        "By the end of the year {she} has {a:times} as many {things}.",
        "A month later {her} collection is {a:times} as large."),
        rationales=("The collection grows to {expr} {things}.", "Then {she} has {expr} {things}.")),
    Move("have", "have", "x+x/a", a=SHARES, sentences=(
        "Then {she} buys {a:share} as many {things} as {she} already has.",
        "{friend} gives {him} {a:share} as many {things} as {name} already has."),
        rationales=("With the new ones, {she} has {expr} {things}.",)),
    Move("have", "money", "x*b", b=PRICES, sentences=(
        "{She} sells all {her} {things} for {b:money} each.", "{name} then sells every {thing} for {b:money}."),
        rationales=("The sale brings {expr} dollars.", "{name} gets {expr} dollars for the {things}.")),
    Move("have", END, "x/a", a=SMALL, sentences=(
        "{She} puts them into {a:word} boxes, the same number in each. How many {things} are in each box?",
        "{She} shares all of them equally among {a} friends. How many {things} does each friend get?",
        "{name} divides them evenly between {a:word} drawers. How many {things} go in each drawer?"),
        rationales=("Each gets {expr} {things}.", "That is {expr} {things} in each part.")),
    Move("have", END, "x/b", b=range(3, 16), sentences=(
        "{She} puts {b} {things} on each shelf. How many shelves does {she} need?",
        "{name} packs them in bags of {b}. How many bags does {she} fill?",
        "{She} gives {b} {things} to each child until none are left. How many children get some?"),
        rationales=("Groups of {b} make {expr} groups.", "{b} at a time gives {expr}.")),
    Move("have", END, "x-q*b", b=range(5, 14), sentences=(
        "{She} fills as many bags of {b} as {she} can. How many {things} are left over?",
        "{name} makes as many rows of {b} {things} as possible. How many {things} remain?"),
        rationales=("{q} groups of {b} can be made, so {expr} {things} are left over.",)),
    Move("have", END, "(x-a)/b", a=SMALL, b=SMALL, sentences=(
        "{She} keeps {a} {things} and splits the rest evenly among {b} friends. How many does each friend get?",
        "{name} sets aside {a} {things} and puts the rest equally into {b} jars. How many {things} are in each jar?"),
        rationales=("Without the {a}, each gets {expr} {things}.",)),
    Move("have", END, "a-x", a=ROUND, sentences=(
        "{She} wants to have {a} {things}. How many more does {she} need?",
        "{Her} goal is {a} {things}. How many {things} are missing?"),
        rationales=("{name} needs {expr} more {things}.", "To reach {a}, {expr} {things} are missing.")),
    Move("have", END, "x*a", a=(2, 3, 4, 5), sentences=(
        "{friend} has {a:times} as many {things} as {name} has now. How many {things} does {friend} have?",
        "{Her} {kin} now has {a:times} as many {things} as {name}. How many {things} does {her} {kin} have?"),
        rationales=("{a:Times} as many is {expr} {things}.",)),
    Move("have", END, "x+x*a", a=(2, 3, 4), sentences=(
        "{friend} has {a:times} as many {things} as {name} has now. "
        "How many {things} do {name} and {friend} have together?",),
        rationales=("Together they have {expr} {things}.",)),
    Move("have", END, "x+x-a", a=SMALL, sentences=(
        "{friend} has {a} fewer {things} than {name} has now. How many {things} do {name} and {friend} have together?",
        "{Her} {kin} now has {a} fewer {things} than {name}. How many {things} do the two have in total?"),
        rationales=("Together they have {expr} {things}.",)),
    Move("have", END, "x+x+a", a=MEDIUM, sentences=(
        "{friend} has {a} more {things} than {name} has now. How many {things} do {name} and {friend} have together?",),
        rationales=("The two of them have {expr} {things}.",)),
    # Goods for sale: baked, made, grown; then packed, then money.
    Move(START, "stock", "a*b", a=SMALL, b=range(6, 37), scenes=BAKED, sentences=(
        "{name} bakes {a:word} trays of {b} {things}.",
        "A baker called {name} makes {b} {things} an hour for {a} hours.",
        "{name}'s bakery makes {a} batches of {b} {things}."),
        rationales=("{name} bakes {expr} {things}.", "In all that is {expr} {things}.")),
    Move(START, "stock", "a*b", a=range(3, 21), b=range(4, 31), scenes=PICKED, sentences=(
        "{name} picks {b} {things} from each of {a} {plants}.", "{name} has {a} {plants}, and each gives {b} {things}.",
        "On {name}'s farm, {a} {plants} bear {b} {things} each."),
        rationales=("The {plants} give {expr} {things}.", "{name} picks {expr} {things}.")),
    Move(START, "stock", "a*b", a=range(3, 13), b=range(3, 16), scenes=CRAFTED, sentences=(
        "{name} makes {b} {things} a day for {a} days.", "In {name}'s workshop {a} people make {b} {things} each.",
        "{name} can make {b} {things} in an hour and works for {a} hours."),
        rationales=("{expr} {things} are made.", "That makes {expr} {things}.")),
    Move(START, "stock", "a*b", a=range(8, 41), b=range(2, 8), scenes=EGGS, sentences=(
        "{name} has {a} hens, and each lays {b} eggs a week. {She} collects one week's eggs.",
        "Each of {name}'s {a} hens laid {b} eggs."),
        rationales=("The hens lay {expr} eggs.",)),
    Move(START, "stock", "a", a=range(24, 241, 4), scenes=(*BAKED, *CRAFTED, *PICKED), sentences=(
        "{name} has {a} {things} to sell.", "{name} brings {a} {things} to the market.",
        "{name}'s shop has {a} {things} in stock.", "There are {a} {things} at {name}'s stall.")),
    Move("stock", "stock", "x-a", a=MEDIUM, sentences=(
        "{She} keeps {a} {things} for {her} family.", "{She} drops {a} of the {things} and cannot sell them.",
        "{name} gives {a} {things} to a neighbor.", "{a} of the {things} are not good enough to sell."),
        rationales=("That leaves {expr} {things}.", "{expr} {things} are left to sell.")),
    Move("stock", "stock", "x+a", a=MEDIUM, sentences=(
        "{Her} {kin} brings {a} more {things}.", "Then {a} more {things} arrive.", "{friend} adds {a} {things}."),
        rationales=("Now there are {expr} {things}.", "{name} has {expr} {things} then.")),
    Move("stock", "stock", "x-x/a", a=SHARES, sentences=(
        "In the morning {a:share} of the {things} get lost.", "{name} gives {a:share} of the {things} to a charity.",
        "{She} sets {a:share} of the {things} aside for {her} family.", "Thieves take {a:share} of the {things}."),
        rationales=("After that {expr} {things} are left.", "Without {a:share}, {expr} {things} remain.")),
    Move("stock", "stock", "x-x*a/100", a=PER_CENT, sentences=(
        "Of the {things}, {a}% are damaged and thrown out.", "{name} gives {a}% of the {things} to a school.",
        "{She} uses {a}% of the {things} as presents."),
        rationales=("Without the {a}%, {expr} {things} are left.", "{expr} {things} remain.")),
    Move("stock", "packed", "x/b", b=range(3, 25), sentences=(
        "{She} packs all the {things} in {packs} of {b}.",
        "{name} puts {b} {things} in each {pack} until none are left."),
        rationales=("{name} fills {expr} {packs}.", "The {things} make {expr} {packs}.")),
    Move("stock", "packed", "(x-a)/b", a=SMALL, b=range(3, 13), sentences=(
        "{She} keeps {a} {things} and packs all the others in {packs} of {b}.",),
        rationales=("The others fill {expr} {packs}.",)),
    Move("stock", "money", "x*b", b=PRICES, sentences=(
        "{She} then sells all {her} {things} for {b:money} each.",
        "At the market {she} gets {b:money} per {thing} for all {she} has.",
        "{name} sells all that {she} has at {b:money} per {thing}."),
        rationales=("The sale brings {expr} dollars.", "{name} earns {expr} dollars.")),
    Move("stock", END, "x-q*b", b=range(5, 21), sentences=(
        "{She} fills as many {packs} of {b} as possible. How many {things} do not fit?",
        "They are sold only in full {packs} of {b}. How many {things} are left over?"),
        rationales=("{q} full {packs} can be made, so {expr} {things} are left over.",)),
    Move("packed", "money", "x*b", b=range(4, 25), sentences=(
        "{She} sells each {pack} for {b:money}.", "A shop buys all the {packs} for {b:money} each."),
        rationales=("The {packs} bring {expr} dollars.", "{name} gets {expr} dollars.")),
    Move("packed", "packed", "x-a", a=SMALL, sentences=(
        "Then {she} loses {a} of the {packs}.", "{She} gives {a} of these {packs} to {friend}."),
        rationales=("Then {expr} {packs} are left.",)),
    # Money that a person has.
    Move(START, "money", "a", a=range(30, 301, 5), sentences=(
        "{name} has ${a}.", "{name} has saved ${a}.", "{name} gets ${a} from {her} {kin}.",
        "There are {a} dollars in {name}'s piggy bank.")),
    Move(START, "money", "a*b", a=range(3, 21), b=range(6, 26), sentences=(
        "{name} works {a} hours for ${b} an hour.", "{name} saves ${b} a week for {a} weeks.",
        "{name} mows {a} lawns at ${b} per lawn.", "{name} gets ${b} for each of {her} {a} music lessons.",
        "{name} washes {a} cars and is paid ${b} for each."),
        rationales=("{name} gets {expr} dollars.", "That makes {expr} dollars.")),
    Move("money", "money", "x+a", a=MEDIUM, sentences=(
        "{Her} {kin} gives {him} ${a} more.", "Then {she} finds ${a} in an old coat.",
        "{She} also earns ${a} by walking a dog.", "{name} gets back ${a} that {she} had lent to {friend}."),
        rationales=("Now {she} has {expr} dollars.", "{name} then has {expr} dollars.")),
    Move("money", "money", "x+a*b", a=SMALL, b=range(5, 16), sentences=(
        "Then {she} works {a:word} hours for ${b} an hour.", "{She} saves another ${b} a week for {a:word} weeks.",
        "{name} also sells {a} old books for ${b} each."),
        rationales=("With that money {she} has {expr} dollars.", "{name} now has {expr} dollars.")),
    Move("money", "money", "x-a", a=MEDIUM, sentences=(
        "{She} spends ${a} on lunch.", "{name} pays ${a} for a bus pass.", "Then {she} buys a game for ${a}.",
        "A repair costs {him} ${a}.", "{She} lends ${a} to {friend}."),
        rationales=("Then {she} has {expr} dollars left.", "That leaves {expr} dollars.")),
    Move("money", "money", "x-a*b", a=SMALL, b=PRICES, sentences=(
        "{She} buys {a:word} tickets for {b:money} each.", "{name} pays for {a} rides at {b:money} per ride.",
        "{She} spends {b:money} a day for {a:word} days."),
        rationales=("After paying, {she} has {expr} dollars.", "That leaves {expr} dollars.")),
    Move("money", "money", "x-x/a", a=SHARES, sentences=(
        "{She} spends {a:share} of {her} money on a jacket.", "{name} gives {a:share} of the money to {her} {kin}.",
        "Then {she} donates {a:share} of the money."),
        rationales=("Without {a:share} of it, {she} has {expr} dollars.", "{name} keeps {expr} dollars.")),
    Move("money", "money", "x-x*a/100", a=PER_CENT, sentences=(
        "{She} pays the rent with {a}% of {her} money.", "{name} gives {a}% of the money to charity.",
        "Then {she} spends {a}% of {her} money."),
        rationales=("After {a}% is gone, {expr} dollars are left.", "{She} keeps {expr} dollars.")),
    Move("money", END, "a-x", a=ROUND, sentences=(
        "{She} wants to buy a bike for ${a}. How many more dollars does {she} need?",
        "A new phone costs ${a}. How much more money does {name} need for it?",
        "{name} is saving ${a} for a trip. How many dollars are still missing?"),
        rationales=("{name} still needs {expr} dollars.", "To reach {a} dollars, {expr} are missing.")),
    Move("money", END, "x/a", a=SMALL, sentences=(
        "{She} spreads all {her} money evenly over {a} days. How many dollars can {she} spend each day?",
        "{She} divides all the money equally among {her} {a} children. How many dollars does each child get?"),
        rationales=("Each part is {expr} dollars.",)),
    Move("money", END, "x/b", b=range(3, 13), sentences=(
        "{She} spends all {her} money on tickets that cost ${b} each. How many tickets does {she} buy?",
        "A cup of tea costs ${b}. How many cups can {name} buy with all {her} money?"),
        rationales=("{name} can buy {expr} of them.",)),
    Move("money", END, "x-q*b", b=range(6, 20), sentences=(
        "{She} buys as many books at ${b} each as {she} can. How many dollars are left?",),
        rationales=("{She} can buy {q}, so {expr} dollars are left.",)),
    # A bill in a shop.
    Move(START, "bill", "a*b", a=SMALL, b=PRICES, scenes=BOUGHT, sentences=(
        "{name} buys {a:word} {things} for {b:money} each.", "{name} orders {a} {things} at {b:money} per {thing}.",
        "One {thing} costs {b:money}. {name} takes {a} of them."),
        rationales=("The {things} cost {expr} dollars.", "{name} pays {expr} dollars for the {things}.")),
    Move(START, "bill", "a", a=range(20, 201, 5), scenes=BOUGHT, sentences=(
        "{name} buys some {things} for a total of ${a}.", "{name}'s shopping basket comes to ${a}.")),
    Move("bill", "bill", "x+a", a=range(3, 25), sentences=(
        "{She} also buys {other} for ${a}.", "{name} adds {other} that costs ${a}.", "Delivery costs another ${a}."),
        rationales=("That makes {expr} dollars.", "The bill rises to {expr} dollars.")),
    Move("bill", "bill", "x+a*b", a=SMALL, b=range(2, 13), sentences=(
        "{She} also buys {a:word} pens for ${b} each.", "{name} adds {a} gift cards at ${b} each."),
        rationales=("The bill is then {expr} dollars.", "Together that costs {expr} dollars.")),
    Move("bill", "bill", "x-a", a=range(3, 16), sentences=(
        "A coupon takes ${a} off the bill.", "{She} has a voucher worth ${a} and uses it.",
        "The shop takes ${a} off because of a small scratch."),
        rationales=("The bill falls to {expr} dollars.", "After that {expr} dollars are due.")),
    Move("bill", "bill", "x-x*a/100", a=PER_CENT[:6], sentences=(
        "{name} gets {a}% off the whole bill so far.", "Then the total so far is reduced by {a}%.",
        "A club card takes {a}% off the bill so far."),
        rationales=("With {a}% off it is {expr} dollars.", "The reduced bill is {expr} dollars.")),
    Move("bill", "bill", "x+x*a/100", a=(5, 10, 15, 20), sentences=(
        "A tax of {a}% is added to the bill so far.", "{She} adds a tip of {a}% of the bill so far."),
        rationales=("With {a}% more it is {expr} dollars.", "The bill grows to {expr} dollars.")),
    Move("bill", END, "a-x", a=(20, 50, 100, 150, 200, 300), sentences=(
        "{She} pays with ${a} in cash. How many dollars does {she} get back?",
        "{name} came with ${a}. How many dollars does {she} have after paying?"),
        rationales=("{name} gets back {expr} dollars.", "Out of {a} dollars, {expr} are left.")),
    Move("bill", END, "x/a", a=range(2, 7), sentences=(
        "{name} and {her} friends, {a} people in all, split the bill equally. How many dollars does each person pay?",
        "{She} pays it in {a} equal monthly parts. How many dollars does {she} pay each month?"),
        rationales=("Each part is {expr} dollars.",)),
    # Time spent, in minutes.
    Move(START, "minutes", "a*b", a=range(2, 8), b=range(10, 61, 5), scenes=PRACTICE, sentences=(
        "{name} {practises} {activity} for {b} minutes a day on {a} days.",
        "In one week {name} {practises} {activity} {a} times, {b} minutes each time."),
        rationales=("That takes {expr} minutes.", "{name} spends {expr} minutes on it.")),
    Move(START, "minutes", "a*60", a=range(2, 6), scenes=PRACTICE, sentences=(
        "{name} {practises} {activity} for {a:word} hours.",),
        rationales=("In minutes that is {expr}.",)),
    Move(START, "minutes", "a", a=range(20, 121, 5), scenes=PRACTICE, sentences=(
        "{name} {practises} {activity} for {a} minutes.",
        "On Saturday {name} {practises} {activity} for {a} minutes.")),
    Move("minutes", "minutes", "x+a", a=MEDIUM, sentences=(
        "{She} spends another {a} minutes on {extra}.", "After that {she} needs {a} minutes to tidy up.",
        "Getting there and back takes another {a} minutes."),
        rationales=("Together that is {expr} minutes.", "The total is {expr} minutes.")),
    Move("minutes", "minutes", "x+a*b", a=SMALL, b=range(3, 16), sentences=(
        "{She} also takes {a:word} breaks of {b} minutes each.",
        "Then {she} works through {a} worksheets, {b} minutes each."),
        rationales=("With these, it is {expr} minutes.", "That brings it to {expr} minutes.")),
    Move("minutes", END, "a*60-x", a=range(2, 9), sentences=(
        "{She} has {a} hours for all of this. How many minutes are left?",
        "{She} planned {a} hours for everything. How many minutes does {she} have left?"),
        rationales=("Of {a} hours, {expr} minutes are left.",)),
    Move("minutes", END, "x/60", sentences=(
        "How many hours is that in all?", "How many hours does {name} spend in total?"),
        rationales=("In hours that is {expr}.",)),
    # Work that is left to do.
    Move(START, "todo", "a", a=range(60, 481, 10), scenes=TASKS, sentences=(
        "{name} has {goal} of {a} {things} to {do}.", "{name} starts on {goal} of {a} {things}.",
        "{name} wants to {do} {a} {things}.")),
    Move(START, "todo", "a*b", a=range(4, 13), b=range(8, 31), scenes=TASKS, sentences=(
        "{name} has {goal} in {a} parts of {b} {things} each to {do}.",
        "{name} plans to {do} {b} {things} a day for {a} days."),
        rationales=("There are {expr} {things} to {do}.", "In all that is {expr} {things}.")),
    Move("todo", "todo", "x-a", a=range(8, 51), sentences=(
        "One day {she} {does} {a} {things}.", "{She} {does} {a} {things} before lunch.",
        "{name} {does} {a} of the {things} and takes a break.", "After a short rest {she} {does} {a} more {things}."),
        rationales=("Then {expr} {things} are left.", "That leaves {expr} {things}.")),
    Move("todo", "todo", "x-a*b", a=SMALL, b=range(4, 26), sentences=(
        "{She} {does} {b} {things} an hour for {a:word} hours.", "For {a:word} days {she} {does} {b} {things} a day.",
        "On each of the next {a} days {she} {does} {b} {things}."),
        rationales=("After that {expr} {things} are left.", "{expr} {things} remain.")),
    Move("todo", "todo", "x-x/a", a=SHARES, sentences=(
        "Then {she} {does} {a:share} of the {things} that are left.",
        "In the evening {she} {does} {a:share} of what is left.",
        "At the weekend {name} {does} {a:share} of the {things} that are left."),
        rationales=("Without {a:share}, {expr} {things} remain.", "Then {expr} {things} are still left.")),
    Move("todo", "todo", "x-x*a/100", a=PER_CENT, sentences=(
        "In the afternoon {she} {does} {a}% of the {things} that are left.",
        "The next morning {name} {does} {a}% of what is left."),
        rationales=("After that {a}%, {expr} {things} are left.", "{expr} {things} remain.")),
    Move("todo", END, "x/a", a=range(2, 15), sentences=(
        "How many {things} a day must {she} {do} to finish in {a} days?",
        "{She} splits what is left evenly over {a} days. How many {things} is that per day?"),
        rationales=("That is {expr} {things} a day.",)),
    Move("todo", END, "x/b", b=range(4, 31), sentences=(
        "{She} finishes at {b} {things} a day. How many days does that take?",
        "At {b} {things} an hour, how many hours does {name} need to finish?"),
        rationales=("At that rate it takes {expr}.",)),
    # Travel, and the fuel it takes.
    Move(START, "distance", "a*b", a=range(2, 8), b=range(40, 96, 5), scenes=VEHICLES, sentences=(
        "{name} {drives} a {vehicle} at {b} kilometers per hour for {a:word} hours.",
        "{name} {drives} {b} kilometers a day by {vehicle} for {a} days."),
        rationales=("{name} {drives} {expr} kilometers.", "That is {expr} kilometers.")),
    Move(START, "distance", "a", a=range(40, 301, 10), scenes=VEHICLES, sentences=(
        "{name} {drives} a {vehicle} for {a} kilometers.", "{name}'s {vehicle} covers {a} kilometers in the morning.")),
    Move("distance", "distance", "x+a", a=range(10, 91, 5), sentences=(
        "Then {she} {drives} {a} kilometers more.", "A detour adds {a} kilometers."),
        rationales=("In all that is {expr} kilometers.", "The trip is now {expr} kilometers.")),
    Move("distance", "distance", "x+a*b", a=range(2, 6), b=range(30, 81, 5), sentences=(
        "After a rest {she} {drives} {a:word} more hours at {b} kilometers per hour.",),
        rationales=("With that it is {expr} kilometers.", "{name} covers {expr} kilometers then.")),
    Move("distance", "distance", "x*2", sentences=(
        "Then {she} {drives} all the way back by the same road.", "{name} returns by the same route."),
        rationales=("There and back is {expr} kilometers.",)),
    Move("distance", "fuel", "x/b", b=range(5, 26), sentences=(
        "The {vehicle} goes {b} kilometers on each liter of fuel.", "One liter of fuel lasts for {b} kilometers."),
        rationales=("That takes {expr} liters.", "The {vehicle} uses {expr} liters of fuel.")),
    Move("distance", END, "a-x", a=ROUND, sentences=(
        "The whole trip is {a} kilometers. How many kilometers are still to go?",
        "{Her} trip is {a} kilometers long in all. How many kilometers remain?"),
        rationales=("{expr} kilometers are still to go.",)),
    Move("fuel", END, "x*b", b=(2, 3, Fraction(3, 2), Fraction(5, 2)), sentences=(
        "A liter costs {b:money}. How many dollars does the fuel cost?",
        "{name} pays {b:money} per liter. How many dollars does {she} spend on fuel?"),
        rationales=("The fuel costs {expr} dollars.",)),
    Move("fuel", END, "a-x", a=range(40, 121, 5), sentences=(
        "The tank held {a} liters at the start. How many liters are left?",),
        rationales=("In the tank {expr} liters are left.",)),
    # Water that comes and goes.
    Move(START, "water", "a*b", a=range(3, 21), b=range(4, 31), scenes=TANKS, sentences=(
        "A pump fills an empty {tank} with {b} liters of water a minute for {a} minutes.",
        "{name} pours {a} buckets of {b} liters of water into an empty {tank}."),
        rationales=("The {tank} gets {expr} liters.", "That is {expr} liters of water.")),
    Move(START, "water", "a", a=range(60, 601, 20), scenes=TANKS, sentences=(
        "A {tank} holds {a} liters of water.", "There are {a} liters of water in {name}'s {tank}.")),
    Move("water", "water", "x-a", a=range(10, 61, 5), sentences=(
        "{name} takes out {a} liters for the garden.", "A leak lets out {a} liters.",),
        rationales=("Then {expr} liters are left.", "{expr} liters stay in the {tank}.")),
    Move("water", "water", "x+a", a=range(10, 91, 5), sentences=(
        "Rain adds {a} liters.", "{name} pours in {a} more liters."),
        rationales=("Then there are {expr} liters.", "Now the {tank} holds {expr} liters.")),
    Move("water", "water", "x-a*b", a=range(3, 13), b=range(2, 16), sentences=(
        "Water drains at {b} liters a minute for {a} minutes.", "{name} fills {a} cans of {b} liters each from it."),
        rationales=("After that {expr} liters are left.", "That leaves {expr} liters.")),
    Move("water", "water", "x-x/a", a=SHARES, sentences=(
        "Then {a:share} of the water is used.", "Thirsty animals drink {a:share} of the water."),
        rationales=("Without {a:share}, {expr} liters remain.",)),
    Move("water", "water", "x-x*a/100", a=PER_CENT[:6], sentences=(
        "In the heat {a}% of the water dries up.", "{name} lets out {a}% of the water."),
        rationales=("After losing {a}%, it holds {expr} liters.",)),
    Move("water", END, "x/b", b=range(4, 26), sentences=(
        "A pump empties it at {b} liters a minute. How many minutes does that take?",
        "How many cans of {b} liters can be filled with this water?"),
        rationales=("{b} liters at a time gives {expr}.",)),
    # People who come and go.
    Move(START, "crowd", "a", a=range(30, 301, 5), scenes=CROWDS, sentences=(
        "There are {a} {people} at a {place}.", "In the morning {a} {people} are at the {place}.",
        "A {place} counts {a} {people}.")),
    Move(START, "crowd", "a*b", a=range(3, 16), b=range(8, 37), scenes=CROWDS, sentences=(
        "At a {place}, {a} groups of {b} {people} arrive.", "All {a} buses to the {place} bring {b} {people} each."),
        rationales=("There are {expr} {people}.", "That makes {expr} {people}.")),
    Move("crowd", "crowd", "x+a", a=MEDIUM, sentences=(
        "Then {a} more {people} come.", "An hour later {a} {people} join them."),
        rationales=("Now there are {expr} {people}.",)),
    Move("crowd", "crowd", "x-a", a=MEDIUM, sentences=(
        "After a while {a} {people} leave.", "Soon {a} of the {people} go home."),
        rationales=("Then {expr} {people} are left.", "{expr} {people} stay.")),
    Move("crowd", "crowd", "x-x/a", a=SHARES, sentences=(
        "Then {a:share} of the {people} leave.", "When it starts to rain, {a:share} of the {people} go away."),
        rationales=("Without {a:share}, {expr} {people} remain.",)),
    Move("crowd", "crowd", "x*a/100", a=PER_CENT, sentences=(
        "Only {a}% of the {people} stay.", "Later just {a}% of the {people} are still there."),
        rationales=("{a}% of {x} is {expr} {people}.",)),
    Move("crowd", END, "x*b", b=range(3, 21), sentences=(
        "Everyone there pays ${b} for a ticket. How many dollars is that in total?",
        "Everyone there buys a snack for ${b}. How many dollars do they spend?"),
        rationales=("Together they pay {expr} dollars.",)),
    Move("crowd", END, "x/b", b=range(4, 21), sentences=(
        "They form teams of {b}. How many teams are there?",
        "Each guide leads {b} of them. How many guides are needed?"),
        rationales=("Groups of {b} make {expr} groups.",)),
    Move("crowd", END, "x*a/100", a=PER_CENT, sentences=(
        "{a}% of them wear glasses. How many wear glasses?",
        "Exactly {a}% of them have a red hat. How many red hats is that?"),
        rationales=("{a}% of {x} is {expr}.",)),
    # One person compared with the next.
    Move(START, "compared", "a", a=range(4, 49), scenes=DEEDS, sentences=(
        "{name} {did} {a} {things}.", "Last year {name} {did} {a} {things}.")),
    Move(START, "compared", "a*b", a=range(2, 8), b=range(3, 13), scenes=DEEDS, sentences=(
        "{name} {did} {b} {things} a day for {a:word} days.",),
        rationales=("{name} {did} {expr} {things}.",)),
    Move("compared", "compared", "x+a", a=range(3, 25), sentences=(
        "{friend} {did} {a} more {things} than {who}.", "{who} {did} {a} fewer {things} than {friend}."),
        rationales=("{friend} {did} {expr} {things}.", "For {friend} it is {expr} {things}.")),
    Move("compared", "compared", "x-a", a=range(3, 25), sentences=(
        "{friend} {did} {a} fewer {things} than {who}.", "{who} {did} {a} more {things} than {friend}."),
        rationales=("{friend} {did} {expr} {things}.", "For {friend} it is {expr} {things}.")),
    Move("compared", "compared", "x*a", a=(2, 3, 4, 5), sentences=(
        "{friend} {did} {a:times} as many {things} as {who}.",),
        rationales=("{friend} {did} {expr} {things}.",)),
    Move("compared", "compared", "x/a", a=SHARES, sentences=(
        "{friend} {did} {a:share} as many {things} as {who}.",),
        rationales=("{friend} {did} {expr} {things}.",)),
    Move("compared", "compared", "x*a-b", a=(2, 3), b=range(2, 11), sentences=(
        "{friend} {did} {b} fewer than {a:times} as many {things} as {who}.",),
        rationales=("{friend} {did} {expr} {things}.",)),
    Move("compared", END, "x+x*a", a=(2, 3, 4), sentences=(
        "{friend} {did} {a:times} as many {things} as {who}. How many {things} did {who} and {friend} {do} together?",),
        rationales=("Together they {did} {expr} {things}.",)),
    Move("compared", END, "a-x", a=range(30, 121), sentences=(
        "{who} and {friend} {did} {a} {things} in total. How many {things} did {friend} {do}?",),
        rationales=("{friend} {did} {expr} {things}.",)),
    # Ages.
    Move(START, "age", "a", a=range(4, 41), sentences=("{name} is {a} years old.", "{name} has just turned {a}.")),
    Move("age", "age", "x+a", a=range(2, 13), sentences=(
        "{friend} is {a} years older than {who}.", "{who} is {a} years younger than {friend}."),
        rationales=("{friend} is {expr} years old.", "{friend}'s age is {expr}.")),
    Move("age", "age", "x-a", a=range(2, 13), sentences=(
        "{friend} is {a} years younger than {who}.", "{who} is {a} years older than {friend}."),
        rationales=("{friend} is {expr} years old.", "{friend}'s age is {expr}.")),
    Move("age", "age", "x*a", a=(2, 3, 4), sentences=("{friend} is {a:times} as old as {who}.",),
        rationales=("{friend} is {expr} years old.", "{friend}'s age is {expr}.")),
    Move("age", "age", "x/a", a=(2, 3), sentences=("{friend} is {a:share} as old as {who}.",),
        rationales=("{friend} is {expr} years old.", "{friend}'s age is {expr}.")),
    Move("age", END, "x+a", a=range(3, 16), sentences=(
        "How old will {who} be in {a} years?", "What will {who}'s age be {a} years from now?"),
        rationales=("In {a} years {who} will be {expr}.",)),
    Move("age", END, "x+x+a", a=range(2, 11), sentences=(
        "{friend} is {a} years older than {who}. What is the sum of the ages of {who} and {friend}?",),
        rationales=("The two ages add up to {expr}.",)),
    # Cooking, in grams.
    Move(START, "food", "a*b", a=range(2, 9), b=range(40, 251, 10), scenes=DISHES, sentences=(
        "One {dish} needs {b} grams of {item}. {name} makes {a} {dishes}.",
        "{name} makes {a:word} {dishes} with {b} grams of {item} in each."),
        rationales=("The {dishes} need {expr} grams.", "{name} uses {expr} grams of {item}.")),
    Move("food", "food", "x+a", a=range(10, 101, 10), sentences=(
        "{She} uses another {a} grams of {item} for a sauce.", "Then {name} adds {a} grams of {item} on top."),
        rationales=("That makes {expr} grams.", "In all it is {expr} grams.")),
    Move("food", "food", "x+x*a/100", a=(10, 20, 25, 50), sentences=(
        "To be safe, {she} takes {a}% more {item} than that instead.",),
        rationales=("With {a}% more it is {expr} grams.",)),
    Move("food", "food",
    "x*a", a=(2, 3, 4), sentences=("For a party {she} takes {a:times} that amount of {item} instead.",),
        rationales=("For the party it is {expr} grams.",)),
    Move("food", END, "a-x", a=range(500, 5001, 250), sentences=(
        "{She} had {a} grams of {item}. How many grams are left?",
        "The bag held {a} grams of {item} at first. How many grams remain in it?"),
        rationales=("That leaves {expr} grams.", "Of {a} grams, {expr} are left.")),
    Move("food", END, "x*b/100", b=range(2, 10), sentences=(
        "A hundred grams of {item} cost ${b}. How many dollars does {she} pay for all the {item}?",),
        rationales=("For {x} grams {she} pays {expr} dollars.",)),
)  # fmt: skip
