"""Classification with five examples: the label is chosen by `select`, for many texts at once.

    python examples/classification.py http://127.0.0.1:8000

All prompts begin with the same examples. The first call of the batch goes ahead, and the others find them cached
where `method` is not an exact one.
"""

import sys

from kvasir.program import Endpoint, Method, State, program, select

LABELS = [" positive", " negative", " neutral"]
SHOTS = (
    ("The soup was cold and the waiter rude.", " negative"),
    ("A wonderful film, I laughed all evening!", " positive"),
    ("The parcel arrived on Tuesday.", " neutral"),
    ("Best purchase I have made in years.", " positive"),
    ("It broke after two days.", " negative"),
)
TEXTS = (
    "I love this little lamp.",
    "Never again, what a waste of money.",
    "The manual has forty pages.",
    "My kids are delighted with it.",
    "The handle came off at once.",
    "It is sold in three sizes.",
)


@program
def classify(s: State, text: str, method: Method = "auto") -> str:
    """One of LABELS. `greedy` reads the examples from the server's cache, which exact scores cannot."""
    s += "Each text is positive, negative or neutral.\n\n"
    for example, label in SHOTS:
        s += f"Text: {example}\nLabel:{label}\n\n"
    s += f"Text: {text}\nLabel:" + select("label", LABELS, method=method)
    return s["label"].strip()


def main(url: str) -> None:
    """Print each text's label."""
    with Endpoint(url) as endpoint:
        states = classify.run_batch(endpoint, [{"text": text} for text in TEXTS])
        for state, text in zip(states, TEXTS, strict=True):
            print(f"{state.error or state.returned:10} {text}")
        print(f"(chosen by {states[0].meta('label').method})")


if __name__ == "__main__":
    main(sys.argv[1])
