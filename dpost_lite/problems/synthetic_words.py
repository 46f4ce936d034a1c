"""Building blocks of the synthetic stories: the `Move`, names of people and things, ranges of numbers. Data only."""

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
