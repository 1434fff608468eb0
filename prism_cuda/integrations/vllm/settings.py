"""Settings from vLLM's command line: ``--additional-config '{"prism": {"top_p": 0.9}}'``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_cuda.config import PrismConfig

# Where sequences of fewer keys stay with FlashAttention unless dense_below is set. Above
# PrismConfig's own, which was measured against torch's attention, and not measured in vLLM yet.
DENSE_BELOW = 8192

_OWN = ("config", "workspace_tokens")


@dataclass(frozen=True)
class Settings:
    """What ``additional_config["prism"]`` says.

    Attributes:
        config: fields of PrismConfig; those of the file that "config" names, if any, and above
            them those given one by one.
        workspace_tokens: bounds the memory of a call: prefills of one step are attended to in
            groups of at most so many keys, each sequence counted as long as the group's longest.
    """

    config: PrismConfig = PrismConfig(dense_below=DENSE_BELOW)
    workspace_tokens: int = 1 << 18


def settings_of(additional_config: Any) -> Settings:
    """The settings in vLLM's ``additional_config``.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    if not additional_config:
        return Settings()
    if not isinstance(additional_config, Mapping):
        raise ValueError(
            f"prism: additional_config is a {type(additional_config).__name__}; expected a dict, "
            'with settings under "prism"'
        )
    given = additional_config.get("prism", {})
    if not isinstance(given, Mapping):
        raise ValueError(
            f'prism: additional_config["prism"] is {given!r}; expected a dict of settings, such as '
            '{"top_p": 0.95}'
        )
    fields = [field.name for field in dataclasses.fields(PrismConfig)]
    for name in given:
        if name not in fields and name not in _OWN:
            raise ValueError(
                f'prism: additional_config["prism"] sets {name!r}; expected '
                f"{', '.join([*fields, *_OWN])}"
            )
    tokens = given.get("workspace_tokens", Settings.workspace_tokens)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(
            f'prism: additional_config["prism"]["workspace_tokens"] is {tokens!r}; expected an '
            "integer above 0"
        )
    values = {"dense_below": DENSE_BELOW} | _settings_of_file(given.get("config"))
    values |= {k: v for k, v in given.items() if k not in _OWN}
    try:
        return Settings(PrismConfig(**values), tokens)
    except ValueError as error:
        raise ValueError(f'prism: additional_config["prism"] is wrong: {error}') from error


def _settings_of_file(path: Any) -> dict[str, Any]:
    """What a config file sets, and no more: what it leaves out has defaults of its own here."""
    if path is None:
        return {}
    if not isinstance(path, str):
        raise ValueError(
            f'prism: additional_config["prism"]["config"] is {path!r}; expected the path of a '
            "config file"
        )
    try:
        PrismConfig.load(path)  # which says what is wrong with it
    except (OSError, ValueError) as error:
        raise ValueError(f'prism: additional_config["prism"]["config"]: {error}') from error
    return json.loads(Path(path).read_text(encoding="utf-8"))


def has_settings_of_heads(config: PrismConfig) -> bool:
    """Whether any setting differs between query heads."""
    if isinstance(config.top_p, tuple) or config.dense_heads or config.bands_per_head():
        return True
    return any(has_settings_of_heads(config.for_layer(layer)) for layer in config.own_layers())
