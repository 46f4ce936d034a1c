"""Moves of the synthetic stories about things and money: collections, goods for sale, money, bills. Data only."""

from dpost_lite.problems.synthetic_words import (
    BAKED,
    BOUGHT,
    COLLECTIBLES,
    CRAFTED,
    EGGS,
    END,
    MEDIUM,
    PER_CENT,
    PICKED,
    PRICES,
    ROUND,
    SHARES,
    SMALL,
    START,
    Move,
)

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
)  # fmt: skip
