"""The word stock of the chronicles: small, so that a tiny model can learn their form."""

# ruff: noqa: SIM905 (names are easier to read and to add to as one line of words)

from __future__ import annotations

WOMEN = (
    "Ada Anna Berta Clara Dora Edith Elsa Freda Greta Hilda Ida Ingrid Joan Kara Lena Mara Nora Olga "
    "Petra Rosa Sara Thea Una Vera Wilma Ysolde"
).split()
MEN = (
    "Adam Anselm Bruno Conrad David Edric Felix Godfrey Harold Hugo Ivo Jonas Kurt Lambert Martin Nils "
    "Osric Paul Ralph Simon Tam Ulric Victor Walter Wynn Yorick"
).split()
TRADES = (
    "weaver smith miller tanner mason fisher shepherd baker potter carter brewer "
    "saddler cooper hunter joiner dyer"
).split()
BYNAMES = ("young", "tall", "fair", "quiet", "bold", "lame", "red", "good")
OFFICES = ("captain", "healer", "steward")

TOWN_STARTS = (
    "Alder Ash Beck Birch Cold Crow Dun Elm Fal Gold Hart Holm King Lark Marsh Oak Raven Stone Thorn Wolf"
).split()
TOWN_ENDS = (
    "burn bury combe cross dale fell field ford gate ham hurst ley mere mouth stead stow ton water wick wood"
).split()
RIVERS = (
    "Arun Brent Calder Derwin Esk Froom Garrow Ister Lune Nith Orrin Severn Tamar Wend Wye Yarrow"
).split()

SITES = ("at the ford of", "on the high bank of", "by the spring of", "in the bend of", "on an island in")
OATHS = (
    "that no poor man would go hungry",
    "that a lamp would burn every night",
    "that the oldest oak would never be cut",
    "that one loaf in ten would go to strangers",
    "that no child would be sold for a debt",
    "that the bell would ring for every guest",
    "that no sword would come into the market",
    "that all might fish in the river",
)
HANDS = ("on a stone", "on the plough", "on the bread", "in the water", "on the first door")
TREASURES = (
    "the silver bell",
    "the golden cup",
    "the iron crown",
    "the red jewel",
    "the book of laws",
    "the white shield",
    "the copper horn",
    "the box of letters",
)
PLACES = (
    "under the old ash tree",
    "in the dry well",
    "beneath the mill stone",
    "behind the altar",
    "in the grave of a monk",
    "under the tower stairs",
    "in the hollow wall",
    "under the pear tree",
)
FATES = (
    "sold it to strangers",
    "gave it to the town",
    "threw it into the river",
    "sent it to the king",
    "kept it until death",
    "carried it to the sea",
)
WORKS = (
    "the stone bridge",
    "the watch tower",
    "the long wall",
    "the new mill",
    "the great hall",
    "the harbour",
    "the school",
    "the granary",
)
PAYMENTS = ("for love of the place", "for a debt", "to keep a promise", "in memory of a brother", "for a bet")
CLAIMS = (
    "the lower fields",
    "the salt road",
    "the fishing right",
    "the oak wood",
    "the ferry toll",
    "the hill",
)
DOORS = ("the water gate", "the north gate", "the little door", "the tower", "the sluice", "the store house")
PRICES = (
    "ten bags of salt",
    "a farm on the hill",
    "forty silver coins",
    "the hand of a bride",
    "a ship of wine",
    "an old grudge",
    "a seat in the council",
    "a black horse",
)
RESCUES = (
    "burned the enemy's boats",
    "broke the dam above the camp",
    "held the stairs alone",
    "brought riders by night",
    "killed the enemy's leader",
    "let the bulls loose",
)
FINDINGS = ("in a boat", "in the snow", "at the church door", "in a burned cart", "among the sheep")
CAREERS = (
    "the best judge of the land",
    "a maker of bells",
    "a famous singer",
    "the master of the ferry",
    "a teacher of children",
    "a shipbuilder",
)

LESSONS = ("to ride", "to read", "to swim", "to count", "to dance", "to keep silent", "to hunt with a hawk")
GRAINS = ("barley", "wheat", "oats", "rye")
GOODS = (
    "salt",
    "wool",
    "iron",
    "wine",
    "honey",
    "leather",
    "cloth",
    "timber",
    "fish",
    "wax",
    "glass",
    "rope",
)
CAUSES = ("a fever", "old age", "a fall from a horse", "the cough", "a wound", "grief", "the cold")
GRAVES = ("by the east wall", "beside the river", "on the hill", "under the limes", "near the church")
QUARRELS = ("a cow", "a field", "a wall", "a dowry", "a dog", "a net", "a well", "a cart of hay")
DAYS = (
    "at the feast of the first snow",
    "on market day",
    "at the spring fair",
    "after the harvest",
    "on the longest day",
)
WEATHER = (
    "The winter was long and the river {river} froze from bank to bank.",
    "Rain fell for thirty days and the lower street stood under water.",
    "The summer was dry and the wells had to be dug deeper.",
    "A storm took the roofs of six houses, but nobody was hurt.",
    "There was fog on the river {river} for a whole month.",
    "A star with a tail was seen over {town} and the old people were afraid.",
    "The snow came early and the sheep were brought in from the hill.",
    "The river {river} rose in the night and took away two boats.",
    "The spring was mild and the bees swarmed early.",
    "Lightning struck the old pine and it burned for two days.",
)
BEASTS = (
    "Wolves came down to the fields and took {number} sheep.",
    "A sickness came among the cattle and {number} cows died.",
    "Mice ate a part of the grain in the store house.",
    "A bear was seen at the edge of the wood and {person} drove it off.",
    "There were so many fish that year that {person} fed them to the pigs.",
    "{person} taught a crow to speak, and people came far to hear it.",
)
WAR_TIMES = (
    "The walls were watched by night because of the war with {enemy}.",
    "No cart went out to {enemy}, for there were spears on the road.",
    "The women carried stones to the walls against the men of {enemy}.",
    "{person} was wounded in the fields by an arrow from {enemy}.",
)
