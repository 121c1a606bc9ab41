"""The words the generated English is made of, from words.json: every one is a single token of the tiny tokenizer.

Every object starts with a consonant sound, so "a" is always the right article. In openings and actions, {A} and {B} are
the two names in order of mention, {S} the one said again, {P} the place and {O} the object.
"""

import json
from pathlib import Path

_FILE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_SERIES = ("NAMES", "PLACES", "OBJECTS", "COLORS", "DAYS", "MONTHS", "NUMBERS", "LETTERS")
NAMES, PLACES, OBJECTS, COLORS, DAYS, MONTHS, NUMBERS, LETTERS = (
    tuple[str, ...](_FILE[key].split()) for key in _SERIES
)
OPENINGS, ACTIONS = (tuple[str, ...](_FILE[key]) for key in ("OPENINGS", "ACTIONS"))
# An opening that ends in "and" needs no comma before the action.
TEMPLATES = tuple(f"{one}{' ' if one.endswith('and') else ', '}{action}" for one in OPENINGS for action in ACTIONS)
