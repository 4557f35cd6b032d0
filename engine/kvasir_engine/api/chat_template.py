"""Renders chat templates in processes that can be killed: a template's loop must not end the server."""

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir_engine.api import template_process
from kvasir_engine.api.bounded_process import BoundedProcess, ProcessEnded
from kvasir_engine.api.rendering import AS_USUAL, Rendering


class TemplateError(Exception):
    """The chat template refuses these messages, with its own message."""


class TemplateCost(TemplateError):
    """The template exceeds its limit of time, memory or text."""


@dataclass(frozen=True)
class TemplateLimits:
    """The limits of one rendering. `seconds` are of CPU time; after `patience` seconds the process is killed."""

    seconds: float = 2.0
    patience: float = 15.0
    memory: int = 512 * 2**20
    characters: int = 64 * 2**20


LIMITS = TemplateLimits()
PROCESSES = 2
START_SECONDS = 120.0


class _Renderer:
    """One process of template_process.py. Any failure ends it."""

    def __init__(self, memory: int) -> None:
        self._process = BoundedProcess(template_process.__name__, str(memory))
        self._warm = False

    def ask(self, request: dict[str, Any], patience: float) -> dict[str, str]:
        """The answer. Raises TemplateCost, and ends the process, where it comes too late. The process's own start
        does not count.
        """
        if not self._warm:
            self._exchange({**request, "template": "", "messages": []}, START_SECONDS)
            self._warm = True
        return self._exchange(request, patience)

    def _exchange(self, request: dict[str, Any], patience: float) -> dict[str, str]:
        try:
            answer: dict[str, str] = self._process.exchange(request, patience)
        except TimeoutError:
            raise TemplateCost(f"it does not end within {patience:g} s") from None
        except ProcessEnded:
            raise TemplateCost("its process ended") from None
        return answer

    def end(self) -> None:
        """End the process and wait for it."""
        self._process.end()


class Renderers:
    """At most `PROCESSES` of them, started on demand. Thread-safe."""

    def __init__(self, limits: TemplateLimits = LIMITS) -> None:
        self._limits = limits
        self._free: queue.LifoQueue[_Renderer | None] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._free.put(None)

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, Any],
        how: Rendering = AS_USUAL,
    ) -> str:
        """`messages` in `template`, up to the point where the assistant begins or continues. `tokens`: special
        tokens by name.

        Raises TemplateError.
        """
        limits = self._limits
        renderer = self._free.get()
        try:
            if renderer is None:
                renderer = _Renderer(limits.memory)
            request = {
                "template": template,
                "messages": [dict(each) for each in messages],
                "options": {
                    "add_generation_prompt": how.add_generation_prompt,
                    "continue_final_message": how.continue_final_message,
                },
                "variables": {**tokens, **how.variables},
                "tools": None if how.tools is None else [dict(each) for each in how.tools],
                "seconds": limits.seconds,
                "characters": limits.characters,
            }
            answer = renderer.ask(request, limits.patience)
        except BaseException:
            renderer = None
            raise
        finally:
            self._free.put(renderer)
        if "text" in answer:
            return answer["text"]
        if "costly" in answer:
            raise TemplateCost(answer["costly"])
        raise TemplateError(answer["refused"])

    def close(self) -> None:
        """End the processes. They also end with this one."""
        for _ in range(PROCESSES):
            renderer = self._free.get()
            if renderer is not None:
                renderer.end()
            self._free.put(None)


renderers = Renderers()
"""The renderers that all tokenizers of this process share."""
