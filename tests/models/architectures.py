"""Every architecture of the installed transformers that generates text, as tiny random models."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from models.overrides import INPUTS, OVERRIDES
from models.tiny import tiny_config

MAPPINGS = {
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}

MOST_PARAMETERS = 1 << 25


@dataclass(frozen=True)
class Architecture:
    """An entry of transformers' own tables of models."""

    model_type: str
    kind: str
    class_name: str

    def model_class(self) -> Any:
        return getattr(transformers, self.class_name)

    def config(self) -> Any:
        return tiny_config(self.model_type, OVERRIDES.get(self.model_type))

    def build(self, attention: str = "eager", seed: int = 0) -> Any:
        """A random model that attends to more than the mean of its tokens."""
        torch.manual_seed(seed)
        config = self.config()
        with torch.device("meta"):
            size = sum(p.numel() for p in self.model_class()(self.config()).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{self.model_type}: {size} parameters; expected {MOST_PARAMETERS}")
        model = self.model_class()._from_config(config, attn_implementation=attention)
        model = model.float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Some are left as they were allocated.
                if name.endswith("sinks") or not parameter.abs().amax().lt(1e3):
                    torch.nn.init.normal_(parameter, std=1.0 if name.endswith("sinks") else 0.02)
                if any(part in name for part in ("q_proj", "k_proj", "q_b_proj", "qkv", "c_attn")):
                    parameter.mul_(6)
        return model

    def inputs(self, batch: int, length: int, model: Any = None) -> dict[str, Any]:
        """Arguments of a forward pass over ``length`` tokens."""
        ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))
        make = INPUTS.get(self.model_type)
        if make is not None:
            return make(self.config(), ids)
        if self.config().is_encoder_decoder:
            return {"input_ids": ids[:, : length // 2].flip(1), "decoder_input_ids": ids}
        return {"input_ids": ids}


@functools.cache
def architectures() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for kind, mapping in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, mapping, {}).items():
            name = names if isinstance(names, str) else names[0]
            if model_type not in found:
                found[model_type] = Architecture(model_type, kind, name)
    return found


ARCHITECTURES = architectures()
