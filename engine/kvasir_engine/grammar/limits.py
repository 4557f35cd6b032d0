"""Limits of grammars. llguidance counts steps of its own work, of which a few thousand take 1 ms."""

from llguidance import LLParserLimits

MOST_NESTING = 64
"""Of a schema's JSON."""
MOST_SCHEMA_VALUES = 50_000
"""Values in a schema's JSON, objects and lists included."""
MOST_PROPERTIES = 2_000
"""Of one object."""
MOST_ITEMS = 10_000
"""`minItems`, `maxItems`, `minProperties` and `maxProperties`."""
MOST_LENGTH = 1_000_000
"""`minLength` and `maxLength`."""
MOST_FACTOR = 10_000
"""`multipleOf`, counted in its last decimal."""
MOST_REPEATS = 10_000
"""Copies that a regex's counted repetitions make, nested ones multiplied."""
MOST_CHOICES = 10_000
MOST_TAGS = 128
MOST_TAG_NESTING = 16


def parser_limits() -> LLParserLimits:
    """Lower than the library's own: a longer step would delay the batch."""
    return LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=25_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
