"""A transformers model under one attention or another: nats of text, answers, density, time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from prism_cuda.config import PrismConfig
from prism_cuda.demo import LOGIT_CHUNK, logits_of, model_folder, nats_of
from prism_cuda.integrations import register
from prism_cuda.recording import record
from prism_cuda.tune.tasks import Sample

NAME = "prism_tune"


class Model:
    """A model and its tokenizer."""

    def __init__(self, name: str, device: torch.device) -> None:
        """Load ``name``: smollm2 (downloaded once), testbed, a folder, or a model on the Hub.

        Raises:
            ImportError: without transformers, or with a version that is not supported.
        """
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ImportError(
                "tune needs transformers >= 5.17: pip install 'prism-cuda[hf]'"
            ) from error
        # Names of the demo's models first, then folders, then the Hub's names.
        demos = name in ("smollm2", "testbed")
        path = str(model_folder(name)) if demos else name
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.model: Any = model.to(device).eval()
        self.device = device
        self.limit: int = self.model.config.get_text_config().max_position_embeddings

    @torch.inference_mode()
    def hidden(self, sample: Sample, attention: str) -> torch.Tensor:
        """Last hidden states (length, width) under an attention registered by this name."""
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        ids = torch.from_numpy(sample.ids)[None].to(self.device)
        return self.model.base_model(ids, use_cache=False).last_hidden_state[0]

    def measure(self, sample: Sample, config: PrismConfig | None) -> dict[str, float]:
        """Under dense attention (None) or under ``config``.

        Returns:
            density, seconds of the prefill, and "nats", the mean over the second half of a text, or
            "right" and "of", the answer tokens that were likeliest and all of them.
        """
        if config is not None:
            register(config, NAME)
        self._wait()
        start = time.perf_counter()
        with record() as recording:
            hidden = self.hidden(sample, "sdpa" if config is None else NAME)
            self._wait()
        seconds = time.perf_counter() - start
        densities = [call.density for call in recording.calls]
        row = {"density": float(np.mean(densities)) if densities else 1.0, "seconds": seconds}
        if sample.answers:
            hits = self._hits(sample, hidden)
            return row | {"right": int(hits.sum()), "of": len(hits)}
        return row | {"nats": self._nats(sample, hidden)}

    def _nats(self, sample: Sample, hidden: torch.Tensor) -> float:
        first = len(sample.ids) // 2
        targets = torch.from_numpy(sample.ids[first:]).to(self.device)
        with torch.inference_mode():
            return nats_of(self.model, hidden[first - 1 : -1], targets)

    def _hits(self, sample: Sample, hidden: torch.Tensor) -> np.ndarray:
        at = np.concatenate([np.arange(s.start, s.stop) for s in sample.answers])
        rows = hidden[torch.from_numpy(at - 1).to(self.device)]
        with torch.inference_mode():
            best = [logits_of(self.model, part).argmax(-1) for part in rows.split(LOGIT_CHUNK)]
        return torch.cat(best).cpu().numpy() == sample.ids[at]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
