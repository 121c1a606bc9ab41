"""The words the generated English is made of: every one is a single token of the tiny tokenizer."""


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


NAMES = _words("""
    Mary John Tom James Dan Sid Martin Amy Lee Kate Anna Ben Sam Max Jack Emma Lucy Paul Peter Simon David Sarah
    Laura Alice Emily Helen Julia Karen Linda Nancy Susan Carol Diana Henry Kevin Brian Steve Jason Oscar Felix
    Victor Robert Daniel Rachel Ruth Jane Eric Adam Alan Carl Dean Fred Gary Greg Hugo Ivan Joel Karl Leon Luke Nick
    Noah Owen Ryan Sean Nina
    """)

PLACES = _words("""
    store school park garden beach market house farm church hotel museum station library bank lake forest bakery
    castle cinema river
    """)

# Every object starts with a consonant sound, so "a" is always the right article.
OBJECTS = _words("drink book ring ball kiss letter gift key cup hat coat map pen bell rose cake lamp box watch coin")

COLORS = _words("red blue green black white brown pink gold")

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

# {A} and {B} are the two names in order of mention, {P} the place, {O} the object.
OPENINGS: tuple[str, ...] = (
    "When {A} and {B} went to the {P}",
    "After {A} and {B} went to the {P}",
    "When {A} and {B} got to the {P}",
    "While {A} and {B} were at the {P}",
    "Then, {A} and {B} had a long day at the {P}, and",
    "Then, {A} and {B} were working at the {P}, and",
    "Friends {A} and {B} found a {O} at the {P}, and",
    "The {P} that {A} and {B} went to had a {O}, and",
)

# {S} is the name said again, the subject; the indirect object comes next.
ACTIONS: tuple[str, ...] = (
    "{S} gave a {O} to",
    "{S} handed the {O} to",
    "{S} wanted to give a {O} to",
    "{S} sent the {O} to",
    "{S} bought a {O} for",
    "{S} said hello to",
)


# An opening that ends in "and" needs no comma before the action.
TEMPLATES = tuple(f"{one}{' ' if one.endswith('and') else ', '}{action}" for one in OPENINGS for action in ACTIONS)
