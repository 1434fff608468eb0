"""Budgets of heads or layers: the top_p of each that costs least at the error of one for all.

Every forward pass is dense. In every layer the attention is computed again with every top_p, and
of every head noted: its density, and the square of the error that it adds to the residual stream,
relative to the stream; averaged over all rows and, as much again, over those that predict answers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from prism_cuda.config import PrismConfig
from prism_cuda.recording import record
from prism_cuda.tune.choice import choose
from prism_cuda.tune.model import Model
from prism_cuda.tune.tasks import Sample

NAME = "prism_tune_fit"
TOP_P = (0.5, 0.7, 0.8, 0.88, 0.92, 0.95, 0.97, 0.98, 0.99, 0.995)
ALL = 1 << 62  # keys: no sequence is so long


def row_weights(sample: Sample) -> torch.Tensor:
    """float32 (length,): all rows weigh 1 together, and those that predict answers 1 more."""
    rows = torch.full((len(sample.ids),), 1 / len(sample.ids))
    at = [i - 1 for answer in sample.answers for i in range(answer.start, answer.stop)]
    if at:
        rows[torch.tensor(at)] += 1 / len(at)
    return rows


class Fit:
    """What every top_p costs and spoils, summed over passes.

    Attributes:
        density, error: by layer (heads, len(top_p)), of the layers that run sparse.
    """

    def __init__(self, model: Model, config: PrismConfig, top_p: tuple[float, ...] = TOP_P) -> None:
        """
        Raises:
            ValueError: if the model has no layers with an output projection where most have them.
        """
        from transformers import AttentionInterface, AttentionMaskInterface

        from prism_cuda.integrations.transformers import PrismAttention

        self.model, self.top_p = model, top_p
        self.density: dict[int, np.ndarray] = {}
        self.error: dict[int, np.ndarray] = {}
        self.passes = 0
        self._streams: dict[int, torch.Tensor] = {}
        self._rows = torch.empty(0)
        self._hooks: list[Any] = []
        sparse = dataclasses.replace(config, dense_below=0)
        self._dense = PrismAttention(dataclasses.replace(config, dense_below=ALL))
        self._sparse = [PrismAttention(dataclasses.replace(sparse, top_p=p)) for p in top_p]
        layers = getattr(model.model.base_model, "layers", None)
        if layers is None:
            kind = type(model.model).__name__
            raise ValueError(f"tune: {kind} has no base_model.layers; expected a decoder of layers")
        for index, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(self._note_stream(index), with_kwargs=True)
            self._hooks.append(hook)
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, AttentionMaskInterface()["prism"])

    def _note_stream(self, index: int) -> Any:
        def note(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._streams[index] = hidden[0].float().square().sum(-1)

        return note

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def run(self, sample: Sample) -> None:
        """One more pass."""
        self._rows = row_weights(sample).to(self.model.device)
        self.model.hidden(sample, NAME)
        self.passes += 1

    def _attend(self, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out, _ = self._dense(module, query, *args, **kwargs)
        layer = module.layer_idx
        projection = getattr(module, "o_proj", None)
        if projection is None:
            raise ValueError(
                f"tune: {type(module).__name__} has no o_proj; expected one to weigh by"
            )
        by_head = projection.weight.float().unflatten(1, out.shape[2:]).permute(1, 2, 0)
        gram = by_head @ by_head.mT  # (heads, head_dim, head_dim): |x W|^2 is x gram x
        densities, errors = [], []
        for attend in self._sparse:
            with record(masks=True) as recording:
                ours, _ = attend(module, query, *args, **kwargs)
            if not recording.calls or recording.calls[0].mask is None:
                return out, None  # a window, or whatever else runs dense
            densities.append(recording.calls[0].mask.density_per_head()[0])
            spoilt = (ours - out)[0].float().transpose(0, 1)
            square = ((spoilt @ gram) * spoilt).sum(-1)
            relative = square / self._streams[layer].clamp_min(1e-20)
            errors.append((relative * self._rows).sum(-1))
        for sums, new in ((self.density, densities), (self.error, errors)):
            stacked = torch.stack(new, -1).double().cpu().numpy()
            sums[layer] = sums.get(layer, 0) + stacked
        return out, None

    def state(self) -> dict[str, Any]:
        """In JSON's types, for :meth:`restore`."""
        sums = {
            name: {str(layer): values.tolist() for layer, values in found.items()}
            for name, found in (("density", self.density), ("error", self.error))
        }
        return {"passes": self.passes, **sums}

    def restore(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]
        for name in ("density", "error"):
            found = {int(layer): np.array(values) for layer, values in state[name].items()}
            setattr(self, name, found)


def settings_of(fit: Fit, like: float, by: str) -> dict[str, Any]:
    """PrismConfig's top_p and layers: least density at the error of one top_p for all.

    Args:
        like: that top_p, one of the fit's. by: "head" or "layer", what gets a top_p of its own.

    Raises:
        ValueError: if no layer ran sparse.
    """
    layers = sorted(fit.density)
    if not layers:
        raise ValueError(
            "tune: no layer of this model ran sparse at this length; expected a model and a "
            "length that prism attends to (docs/models.md)"
        )
    density, error = (
        np.concatenate(
            [sums[i] if by == "head" else sums[i].mean(0, keepdims=True) for i in layers]
        )
        / fit.passes
        for sums in (fit.density, fit.error)
    )
    # Less of an error at a higher top_p, whatever few passes say.
    error = np.minimum.accumulate(error, 1)
    allowed = error[:, fit.top_p.index(like)].mean()
    chosen = iter(np.array(fit.top_p)[choose(error, density, allowed)].tolist())
    own: dict[str, Any] = {}
    for layer in layers:
        heads = len(fit.density[layer])
        own[str(layer)] = {
            "top_p": [next(chosen) for _ in range(heads)] if by == "head" else next(chosen)
        }
    return {"top_p": like, "layers": own}
