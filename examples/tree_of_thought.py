"""Tree of thought: at each level several next steps are written, each is rated, and the best are gone on from.

    python examples/tree_of_thought.py http://127.0.0.1:8000

A fork shares all that was said before it, so that only its own step and its rating are new to the server.
"""

import sys

from kvasir.program import Endpoint, Method, State, gen, program, select, system, user

INSTRUCTIONS = """You solve problems step by step. A step is one short sentence that uses only what is known so far,
and that brings the answer nearer. Never repeat a step. Do not guess: what is counted is counted one by one, what is
added is added in order, and what is asked is answered with the unit that the question has.

These are good steps, each after its problem:

Problem: A farm has 12 hens. Each lays 5 eggs a week. A box holds 6 eggs. How many boxes are filled in a week?
Step 1: The hens lay 12 times 5 eggs, which is 60 eggs a week.
Step 2: Boxes of 6 eggs are filled by 60 eggs 60 / 6 times, which is 10 boxes.
Answer: 10 boxes

Problem: A train leaves at 9:40 and travels 150 km at 60 km an hour. When does it arrive?
Step 1: The train needs 150 / 60 hours, which is 2.5 hours or 2 hours and 30 minutes.
Step 2: 9:40 and 2 hours and 30 minutes are 12:10.
Answer: 12:10

Problem: Ann is twice as old as Ben, who is 3 years younger than Cara. Cara is 11. How old is Ann?
Step 1: Ben is 3 years younger than Cara, so Ben is 11 - 3, which is 8 years old.
Step 2: Ann is twice as old as Ben, so Ann is 2 times 8, which is 16 years old.
Answer: 16 years

A bad step is vague ("Let us think about it"), wrong (60 / 6 is 12), or says again what was said. When you are
asked to rate the steps so far, 1 is for steps that lead nowhere, 5 for steps that may lead to the answer, and 9 for
steps that are right and that the answer follows from."""

RATINGS = [str(number) for number in range(1, 10)]


@program
def tree_of_thought(
    s: State,
    problem: str,
    breadth: int = 3,
    keep: int = 2,
    depth: int = 3,
    step_tokens: int = 32,
    method: Method = "auto",
) -> str:
    """The answer to `problem`, after `depth` steps; `keep` states of each level have `breadth` next ones.

    `method` is how steps are rated: a rating is one token, so `greedy` rates as well, and reads the prompt from the
    server's cache.
    """
    s += system(INSTRUCTIONS) + user(f"Problem: {problem}")
    level = [s]
    for step in range(1, depth + 1):
        thoughts = [fork for state in level for fork in state.fork(breadth)]
        for seed, thought in enumerate(thoughts):
            with thought.assistant():
                thought += f"Step {step}:"
                thought += gen("step", max_tokens=step_tokens, stop="\n", temperature=0.8, seed=seed)
        raters = [thought.fork(1)[0] for thought in thoughts]
        for rater in raters:
            rater += user("Rate the steps so far with a number from 1 to 9.")
            with rater.assistant():
                rater += "Rating: " + select("rating", RATINGS, method=method)
        ranked = sorted(zip(thoughts, raters, strict=True), key=lambda each: -int(each[1]["rating"]))
        level = [thought for thought, _ in ranked[:keep]]
    best = level[0]
    best += user("What is the answer?")
    with best.assistant():
        best += "Answer:" + gen("answer", max_tokens=16, stop="\n", temperature=0)
    return best["answer"].strip()


PROBLEM = "A shop sells pens at 3 for 2 dollars. Dan has 11 dollars and keeps 1 dollar. How many pens can he buy?"


def main(url: str) -> None:
    """Solve a problem, and print the answer and what was cached."""
    with Endpoint(url) as endpoint:
        state = tree_of_thought.run(endpoint, problem=PROBLEM)
        usage = state.usage
        print(f"answer: {state.returned}")
        print(f"{usage.calls} calls, {usage.prompt_tokens} prompt tokens, {usage.hit_rate:.1%} of them cached")


if __name__ == "__main__":
    main(sys.argv[1])
