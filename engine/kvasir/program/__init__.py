"""Programs of calls to a model, over any OpenAI-compatible endpoint (docs/program.md).

@program
def joke(s, about):
    s += user(f"A joke about {about}.")
    s += assistant(gen("joke", max_tokens=60))

with Endpoint("http://127.0.0.1:8000") as endpoint:
    print(joke.run(endpoint, about="trees")["joke"])
"""

from kvasir.program.endpoint import Endpoint
from kvasir.program.errors import ProgramError
from kvasir.program.expressions import Method, assistant, gen, select, system, user
from kvasir.program.function import Program, Running, program
from kvasir.program.state import Forks, ProgramUsage, State
from kvasir.program.variable import Generated

__all__ = [
    "Endpoint",
    "Forks",
    "Generated",
    "Method",
    "Program",
    "ProgramError",
    "ProgramUsage",
    "Running",
    "State",
    "assistant",
    "gen",
    "program",
    "select",
    "system",
    "user",
]
