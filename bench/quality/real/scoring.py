"""One model under any selection: perplexity of windows and answers of tasks.

Answers are scored twice from one sparse prefill of a sequence. "strict": teacher-forced, every
answer token is predicted inside the sparse pass. "greedy": as people run it; the first token comes
from the sparse prefill of context and question, the others are decoded greedily with dense
attention to the keys and values that the sparse prefill left.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from attend_kept import attend, decode
from selection import Method, density
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import package  # noqa: E402, F401

from prism_cuda.tune.tasks import Sample  # noqa: E402

NAME = "quality_real"
LOGIT_CHUNK = 2048
WINDOW_CHUNK = 1024
DECODED = 16  # tokens of an answer at most

Attend = Callable[..., torch.Tensor]
Knob = float | dict[int, list[float]]
_attend: Attend | None = None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert _attend is not None, "inside Runner only"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    out = _attend(layer, query, key, value, scale, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer, attending through :class:`Runner`."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=NAME)
    return model.to(device).eval(), tokenizer


@dataclass
class Prefill:
    """What a prefill left.

    Attributes:
        hidden: last hidden states (length, width).
        cache: per layer keys and values (kv_heads, length, head_dim).
        densities: of every layer that attends to everything, its heads' densities.
        estimate: seconds of selection; 0 where they were not measured.
    """

    hidden: torch.Tensor
    cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    densities: dict[int, torch.Tensor] = field(default_factory=dict)
    estimate: float = 0.0


def _windowed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """Causal attention to the last ``window`` tokens, some rows at a time."""
    length = q.shape[1]
    position = torch.arange(length, device=q.device)
    out = torch.empty_like(q)
    for first in range(0, length, WINDOW_CHUNK):
        rows = slice(first, min(first + WINDOW_CHUNK, length))
        keys = slice(max(first - window + 1, 0), rows.stop)
        distance = position[rows, None] - position[None, keys]
        seen = (distance >= 0) & (distance < window)
        out[:, rows] = F.scaled_dot_product_attention(
            q[None, :, rows], k[None, :, keys], v[None, :, keys], seen, scale=scale, enable_gqa=True
        )[0]
    return out


class Runner:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def prefill(
        self, ids: np.ndarray, method: Method, knob: Knob, keep_cache: bool = False
    ) -> Prefill:
        """Run a sequence; ``knob`` is one number or, by layer, one for every head."""
        result = Prefill(torch.empty(0))

        def work(layer, query, key, value, scale, window):
            q, k, v = query[0], key[0], value[0]
            if keep_cache:
                result.cache[layer] = (k, v)
            if window is not None and window < q.shape[1]:
                return _windowed(q, k, v, window, scale)[None]
            own_scale = q.shape[-1] ** -0.5
            begin = time.perf_counter()
            own: Any = knob
            if isinstance(knob, dict):
                own = torch.tensor(knob[layer], device=q.device)[:, None, None]
            mask = method.mask(q if scale == own_scale else q * (scale / own_scale), k, own)
            result.estimate += time.perf_counter() - begin
            if mask is not None:
                result.densities[layer] = density(mask)
            return attend(q, k, v, mask, scale)[None]

        result.hidden = self._forward(work, ids[None])[0]
        return result

    def _forward(self, work: Attend, ids: np.ndarray, positions: Any = None) -> torch.Tensor:
        global _attend
        inputs = torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)
        before, _attend = _attend, work
        try:
            return self.model.base_model(
                input_ids=inputs, position_ids=positions, use_cache=False
            ).last_hidden_state
        finally:
            _attend = before

    @torch.inference_mode()
    def nats(self, ids: np.ndarray, hidden: torch.Tensor) -> np.ndarray:
        """Cross entropy of every token of the last half."""
        first = len(ids) // 2
        targets = torch.from_numpy(ids[first:]).to(self.device)
        parts = [
            F.cross_entropy(self._logits(part), target, reduction="none")
            for part, target in zip(
                hidden[first - 1 : -1].split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True
            )
        ]
        return torch.cat(parts).double().cpu().numpy()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.get_output_embeddings()(hidden).float()

    def _likeliest(self, hidden: torch.Tensor) -> np.ndarray:
        rows = [self._logits(part).argmax(-1) for part in hidden.split(LOGIT_CHUNK)]
        return torch.cat(rows).cpu().numpy()

    @torch.inference_mode()
    def strict(self, sample: Sample, done: Prefill) -> list[np.ndarray]:
        """For every answer, whether each of its tokens is the likeliest one in the sparse pass."""
        positions = np.concatenate([np.arange(s.start, s.stop) for s in sample.answers])
        predicted = self._likeliest(done.hidden[torch.from_numpy(positions - 1).to(self.device)])
        hits = predicted == sample.ids[positions]
        return np.split(hits, np.cumsum([s.stop - s.start for s in sample.answers])[:-1])

    @torch.inference_mode()
    def greedy(self, sample: Sample, done: Prefill) -> list[np.ndarray]:
        """The same for the greedily decoded answers, of at most ``DECODED`` tokens each."""
        starts = np.array([s.start for s in sample.answers])
        sizes = np.array([min(s.stop - s.start, DECODED) for s in sample.answers])
        tokens = self._likeliest(done.hidden[torch.from_numpy(starts - 1).to(self.device)])
        hits = [[tokens[i] == sample.ids[starts[i]]] for i in range(len(starts))]
        lengths = torch.from_numpy(starts).to(self.device)
        own: dict[int, list[torch.Tensor]] = {}

        def work(layer, query, key, value, scale, window):
            if layer in own:
                own[layer] = [torch.cat(pair, 2) for pair in zip(own[layer], (key, value))]  # noqa: B905
            else:
                own[layer] = [key, value]
            mine = (own[layer][0], own[layer][1])
            out = decode(query[:, :, 0], done.cache[layer], mine, lengths, scale, window)
            return out[:, :, None]

        for step in range(1, max(sizes)):
            position = (lengths + step - 1)[:, None]
            hidden = self._forward(work, tokens[:, None], position)
            tokens = self._likeliest(hidden[:, 0])
            for i, answer in enumerate(hits):
                if step < sizes[i]:
                    answer.append(tokens[i] == sample.ids[starts[i] + step])
        return [np.array(answer) for answer in hits]


def counts(answers: list[np.ndarray]) -> list[int]:
    """Tokens right, tokens, answers right, answers."""
    right = sum(int(hits.sum()) for hits in answers)
    whole = sum(bool(hits.all()) for hits in answers)
    return [right, sum(map(len, answers)), whole, len(answers)]


def perplexity(nats: list[float]) -> float:
    return math.exp(sum(nats) / len(nats))
