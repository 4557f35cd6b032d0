"""Are the tokens right? 24 greedy answers of SmolLM2-135M over HTTP beside those of float32 on a CPU.

    python parity.py ask URL MODEL OUT.json [STREAMS]      # ask a running server
    python parity.py compare parity-reference.json OUT.json

Two tokens that are nearly equally likely may change places in bfloat16: `compare` prints, for each answer that
differs, the place and how much likelier the reference's token was there (a difference of log-probabilities). A
difference where that margin is above 0.25 is a fault. Measured: bfloat16 on CPUs 16 of 24 answers whole, margins up to
0.2; FlashInfer with CUDA graphs on an H200 19 of 24, margins up to 0.065.
"""

import concurrent.futures
import json
import sys
import urllib.request

QUESTIONS = [
    "What is the capital of France?", "List three primary colours.", "Write a haiku about the sea.",
    "Explain what a cache is in one sentence.", "What is 12 times 12?", "Name four planets.", "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.", "What does HTTP stand for?", "Give me a recipe for pancakes.",
]  # fmt: skip
TEXTS = [
    "The quick brown fox", "In 1969, the first", "def fibonacci(n):\n",
    "Once upon a time, " + "there was a small town by the river. " * 20,
    "The following is a list of numbers: " + ", ".join(map(str, range(1, 120))), "Water boils at",
    " ".join(f"Item {i} costs {i * 3} dollars." for i in range(1, 90)), "The theory of relativity", "A B C D E F",
    "To be or not to be", "import numpy as np\n", "The history of Rome begins with", "x", "Lorem ipsum dolor sit amet",
]  # fmt: skip
FAULT = 0.25


def ask(url: str, model: str, streams: int) -> list[dict]:
    def one(chat: bool, text: str) -> dict:
        body = {"model": model, "temperature": 0, "max_tokens": 32}
        body |= (
            {"logprobs": True, "top_logprobs": 2, "messages": [{"role": "user", "content": text}]}
            if chat
            else {"logprobs": 2, "prompt": text}
        )
        where = url + ("/v1/chat/completions" if chat else "/v1/completions")
        request = urllib.request.Request(where, json.dumps(body).encode(), {"content-type": "application/json"})
        choice = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["logprobs"]
        if chat:
            best = [
                sorted((each["logprob"] for each in t["top_logprobs"]), reverse=True) for t in choice["content"]
            ]
            tokens = [t["token"] for t in choice["content"]]
        else:
            best = [sorted(top.values(), reverse=True) for top in choice["top_logprobs"]]
            tokens = choice["tokens"]
        return {"toks": tokens, "gap": [b[0] - b[1] if len(b) > 1 else 0.0 for b in best]}

    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        return list(pool.map(lambda each: one(*each), [(True, q) for q in QUESTIONS] + [(False, t) for t in TEXTS]))


def compare(right: list[dict], ours: list[dict]) -> int:
    whole, faults = 0, 0
    for number, (a, b) in enumerate(zip(right, ours, strict=True)):
        pairs = zip(a["toks"], b["toks"], strict=False)
        place = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a["toks"]), len(b["toks"])))
        if place == len(a["toks"]) == len(b["toks"]):
            whole += 1
            continue
        margin = a["gap"][place] if place < len(a["gap"]) else float("inf")
        faults += margin > FAULT
        print(f"answer {number} differs at token {place}, margin {margin:.4f}")
    print(f"{whole} of {len(right)} answers whole, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        answers = ask(sys.argv[2], sys.argv[3], int(sys.argv[5]) if len(sys.argv) > 5 else 8)
        json.dump(answers, open(sys.argv[4], "w"))
    else:
        sys.exit(compare(json.load(open(sys.argv[2])), json.load(open(sys.argv[3]))))
