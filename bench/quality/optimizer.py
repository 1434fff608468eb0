"""Muon and AdamW over bf16 parameters with float32 master copies, and the learning rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import Qwen3ForCausalLM


class Muon:
    """Momentum, made orthogonal: every singular value of a matrix's update is about 1.

    All matrices of one shape are updated together, which keeps the number of kernels small.
    """

    def __init__(
        self, matrices: Sequence[torch.Tensor], momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for matrix in matrices:
            self.groups[matrix.shape].append(matrix)
        self.buffers = {
            shape: torch.zeros_like(torch.stack(group)) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = self.orthogonalize(gradient.lerp(buffer, self.momentum))  # Nesterov
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, direction in zip(group, update, strict=True):
                matrix.mul_(1 - lr * self.weight_decay).add_(direction, alpha=-lr * scale)

    @staticmethod
    def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
        """Newton-Schulz iteration on [n, rows, columns], in bf16."""
        a, b, c = 3.4445, -4.7750, 2.0315  # quintic with the steepest slope at 0
        tall = matrices.shape[1] > matrices.shape[2]
        x = (matrices.mT if tall else matrices).bfloat16()
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.mT if tall else x).float()


class MixedPrecision:
    """bf16 parameters in the model, float32 master copies in the optimizers."""

    def __init__(self, model: Qwen3ForCausalLM, muon_lr: float, adam_lr: float) -> None:
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.params = list(model.parameters())
        self.masters = [param.detach().clone() for param in self.params]
        for param in self.params:  # not model.to(): RoPE's frequencies stay float32
            param.data = param.data.bfloat16()
        embedding = model.get_input_embeddings().weight
        in_muon = [param.ndim == 2 and param is not embedding for param in self.params]
        self.muon = Muon([m for m, yes in zip(self.masters, in_muon, strict=True) if yes])
        self.adam = torch.optim.AdamW(
            [m for m, yes in zip(self.masters, in_muon, strict=True) if not yes],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )

    def step(self, scale: float) -> torch.Tensor:
        """One update at `scale` times the base learning rates; returns the gradient norm."""
        for master, param in zip(self.masters, self.params, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
            param.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.muon.step(self.muon_lr * scale)
        with torch.no_grad():
            for master, param in zip(self.masters, self.params, strict=True):
                param.copy_(master)
        return norm


def learning_rate_scale(done: float, decay_from: float) -> float:
    """Warm-up, plateau, linear decay to zero; `done` is the share of the time used, 0 to 1."""
    warmup = 0.02
    if done < decay_from:
        return min(1.0, 0.05 + done / warmup)
    return max(0.0, (1 - done) / (1 - decay_from))
