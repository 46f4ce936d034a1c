"""Moves of the synthetic stories about measures: time, work, travel, water, people, ages, cooking. Data only."""

from fractions import Fraction

from dpost_lite.problems.synthetic_words import (
    CROWDS,
    DEEDS,
    DISHES,
    END,
    MEDIUM,
    PER_CENT,
    PRACTICE,
    ROUND,
    SHARES,
    SMALL,
    START,
    TANKS,
    TASKS,
    VEHICLES,
    Move,
)

MOVES = (
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
