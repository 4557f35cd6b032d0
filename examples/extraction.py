"""A document's content as 50 fields: a schema for each group of them, all groups at once over the same document.

    python examples/extraction.py http://127.0.0.1:8000

The endpoint has to hold answers to a JSON schema (`response_format`). The document is computed once: the forks
share it, and wait until the first of them has had it computed.
"""

import json
import sys
from typing import Any

from kvasir.program import Endpoint, State, assistant, gen, program, system, user

TEXT, NUMBER, FLAG = {"type": "string", "maxLength": 60}, {"type": "number"}, {"type": "boolean"}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "invoice": {
        **dict.fromkeys(("number", "date", "due_date", "currency", "order", "project", "period", "notes"), TEXT),
        "page_count": NUMBER,
        "is_copy": FLAG,
    },
    "seller": dict.fromkeys(
        ("name", "street", "city", "postcode", "country", "tax_id", "phone", "email", "website", "contact"), TEXT
    ),
    "buyer": dict.fromkeys(
        ("name", "street", "city", "postcode", "country", "tax_id", "phone", "email", "department", "contact"), TEXT
    ),
    "amounts": {
        **dict.fromkeys(
            ("net", "tax_rate", "tax", "gross", "discount", "shipping", "paid", "open", "line_count"), NUMBER
        ),
        "tax_included": FLAG,
    },
    "payment": {
        **dict.fromkeys(("method", "bank", "iban", "bic", "account_holder", "reference", "terms"), TEXT),
        "days": NUMBER,
        "late_fee": NUMBER,
        "is_paid": FLAG,
    },
}
DOCUMENT = """INVOICE 2031-0457                                        Copenhagen, 3 March 2031
Fjord Timber ApS, Havnegade 12, 1058 Copenhagen, Denmark. Tax ID DK-20311457. Phone +45 5550 1234,
office@fjordtimber.example, www.fjordtimber.example. Your contact: Mette Holm.

To: Linden Furniture GmbH, Purchasing, Hafenstrasse 8, 20459 Hamburg, Germany. Tax ID DE-811457203.
Attention: Jonas Brandt, +49 555 7788, jonas@linden.example

Your order LF-8812 of 20 February 2031, project Summer Chairs, delivered in February 2031.

  40 planks of oak, 2 m          60.00      2,400.00
  25 planks of ash, 2 m          44.00      1,100.00
  Discount for regular customers              -100.00
  Shipping                                     200.00
  Net                                        3,600.00
  Tax 25%                                      900.00
  Total EUR                                  4,500.00

Paid in advance: 500.00. Open: 4,000.00, due on 2 April 2031 (30 days net) by bank transfer to Nordhavn Bank,
IBAN DK50 0040 0440 1162 43, BIC NORDDKKK, account holder Fjord Timber ApS, reference 2031-0457.
After the due date 40.00 are added. Page 1 of 1."""


def schema(fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of an object that has all of them, or null where the document does not say."""
    properties = {name: {"anyOf": [kind, {"type": "null"}]} for name, kind in fields.items()}
    return {"type": "object", "properties": properties, "required": [*fields], "additionalProperties": False}


@program
def extract(s: State, document: str) -> dict[str, Any]:
    """Each field's value, by `group.field`."""
    s += system("You read documents and answer with JSON. What a document does not say is null.")
    s += user(document)
    forks = s.fork(len(GROUPS))
    for fork, (group, fields) in zip(forks, GROUPS.items(), strict=True):
        fork += user(f"What does it say of the {group}: {', '.join(fields)}?")
        fork += assistant(gen("fields", schema=schema(fields), max_tokens=512, temperature=0))
    found = dict(zip(GROUPS, (json.loads(text) for text in forks.values("fields")), strict=True))
    return {f"{group}.{name}": found[group][name] for group, fields in GROUPS.items() for name in fields}


def main(url: str) -> None:
    """Print the fields of a document."""
    with Endpoint(url) as endpoint:
        state = extract.run(endpoint, document=DOCUMENT)
        for name, value in state.returned.items():
            print(f"{name:24} {value}")
        print(f"{len(state.returned)} fields, {state.usage.hit_rate:.0%} of the prompts' tokens cached")


if __name__ == "__main__":
    main(sys.argv[1])
