"""Who can answer in a session: the base, and each adapter that lies on it, every one with its own form of prompts.

```
--lora-load DIR          voices: adapter, base          --lora-load a=DIR b=DIR     voices: a, b, base
```

The base speaks in the form of the first adapter, so that their answers can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mindspeed_lora.arguments.configs import BASE
from mindspeed_lora.errors import UsageError
from mindspeed_lora.inference.prompts import PromptFormat
from mindspeed_lora.weights.adapters import Adapter
from mindspeed_lora.weights.lora_spec import LoraSpec

DEFAULT_NAME = "adapter"  # of one that has none


@dataclass(frozen=True)
class Voice:
    """``adapter``: the engine's name of it, None for the base alone; ``stop_ids``: what ends its answers."""

    name: str
    adapter: str | None
    prompt_format: PromptFormat
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that was opened: ``name`` as the user says, ``internal`` as the model's layers do."""

    name: str
    internal: str
    source: Adapter
    spec: LoraSpec


def internal_name(number: int) -> str:
    """Of the adapter ``number`` (from 0)."""
    return "default" if number == 0 else f"extra{number:03d}"


def voices_of(adapters: list[LoadedAdapter], formats: list[tuple[PromptFormat, tuple[int, ...]]]) -> tuple[Voice, ...]:
    """Each adapter's voice, and the base's; ``formats``: of each adapter, or of the base where there is none."""
    own = [
        Voice(adapter.name, adapter.internal, prompt_format, stops)
        for adapter, (prompt_format, stops) in zip(adapters, formats, strict=False)
    ]
    first = own[0] if own else Voice(BASE, None, *formats[0])
    return (*own, replace(first, name=BASE, adapter=None))


def find_voice(voices: tuple[Voice, ...], name: str, where: str) -> Voice:
    """The voice called ``name``.

    Raises:
        UsageError: there is none; ``where`` says who asked.
    """
    for voice in voices:
        if voice.name == name:
            return voice
    raise UsageError(f"{where}: no adapter is called {name}; there is {', '.join(voice.name for voice in voices)}")
