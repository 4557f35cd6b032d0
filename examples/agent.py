"""An agent that answers with tools: it thinks, selects a tool, writes its argument and reads the result.

    python examples/agent.py http://127.0.0.1:8000

All of it is one turn of the assistant, which each call continues; so each finds all that was before in the cache.
"""

import ast
import operator
import sys
from collections.abc import Callable, Mapping

from kvasir.program import Endpoint, State, gen, program, select, system, user

OPERATORS: Mapping[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
PRICES = {"apple": 0.5, "bread": 3.2, "milk": 1.1}


def calculate(text: str) -> str:
    """Sums, differences, products and quotients."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Expression(body):
                return value(body)
            case ast.Constant(int() | float() as number):
                return number
            case ast.BinOp(left, sign, right) if type(sign) in OPERATORS:
                return OPERATORS[type(sign)](value(left), value(right))
        raise ValueError("only numbers and + - * /")

    try:
        return f"{value(ast.parse(text.strip(), mode='eval')):g}"
    except (ValueError, SyntaxError, ArithmeticError, RecursionError) as error:
        return f"error: {error}"


def price(text: str) -> str:
    """What something costs."""
    name = text.strip().strip("'\"").lower()
    return f"{PRICES[name]:g}" if name in PRICES else f"error: known are {', '.join(PRICES)}"


TOOLS: Mapping[str, Callable[[str], str]] = {"calculate": calculate, "price": price}
INSTRUCTIONS = """You answer questions with tools, one line at a time:
Thought: what to do next
Action: calculate(EXPRESSION), price(THING), or finish()
Result: what the tool gave

Question: What do two loaves of bread cost?
Thought: I need the price of bread.
Action: price(bread)
Result: 3.2
Thought: Two of them are 2 * 3.2.
Action: calculate(2 * 3.2)
Result: 6.4
Thought: I know the answer.
Action: finish()
Answer: 6.4"""


@program
def agent(s: State, question: str, most_actions: int = 5) -> str:
    """The answer to `question`."""
    s += system(INSTRUCTIONS) + user(f"Question: {question}")
    with s.assistant():
        for _ in range(most_actions):
            s += "Thought:" + gen("thought", max_tokens=30, stop="\n", temperature=0)
            s += "\nAction:" + select("tool", [f" {name}" for name in (*TOOLS, "finish")])
            tool = s["tool"].strip()
            if tool == "finish":
                break
            s += "(" + gen("argument", max_tokens=20, stop=[")", "\n"], temperature=0)
            s += f")\nResult: {TOOLS[tool](s['argument'])}\n"
        s += "\nAnswer:" + gen("answer", max_tokens=20, stop="\n", temperature=0)
    return s["answer"].strip()


def main(url: str) -> None:
    """Answer a question, and print how."""
    with Endpoint(url) as endpoint:
        state = agent.run(endpoint, question="What do three apples and a milk cost together?")
        print(state.wait().messages[-1].text)
        print(f"(tools chosen by {state.meta('tool').method}; {state.usage.hit_rate:.0%} of the prompts cached)")


if __name__ == "__main__":
    main(sys.argv[1])
