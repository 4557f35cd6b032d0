"""Self-consistency: the same question is answered several times, and what most answers say is believed.

python examples/self_consistency.py http://127.0.0.1:8000
"""

import asyncio
import re
import sys
from collections import Counter

from kvasir.program import Endpoint, State, assistant, gen, program, system, user

QUESTION = "A box has 4 rows of 6 eggs. 5 eggs are broken. How many eggs are whole?"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@program
async def most_say(s: State, question: str, answers: int = 5) -> tuple[str, int] | None:
    """The number that most answers end with, and how many do; None where no answer has one."""
    s += system("Think step by step, briefly. End with the answer as a number.") + user(question)
    forks = s.fork(answers)
    for seed, fork in enumerate(forks):
        fork += assistant(gen("answer", max_tokens=80, temperature=0.8, seed=seed))
    numbers = [found[-1] for text in await forks.avalues("answer") if (found := NUMBER.findall(text))]
    return Counter(numbers).most_common(1)[0] if numbers else None


async def answer(url: str) -> None:
    """Ask, and print what most answers say."""
    with Endpoint(url) as endpoint:
        state = await most_say.arun(endpoint, question=QUESTION)
        print(f"answer and votes: {state.returned}; {state.usage.hit_rate:.0%} of the prompts' tokens cached")


def main(url: str) -> None:
    """The same, where no event loop runs."""
    asyncio.run(answer(url))


if __name__ == "__main__":
    main(sys.argv[1])
