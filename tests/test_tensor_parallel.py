"""Tensor parallelism by transformers: settings name the heads of the whole layer."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

transformers = pytest.importorskip("transformers", minversion="5.24")

from helpers.models import TINY  # noqa: E402

import prism_cuda  # noqa: E402
from prism_cuda import PrismConfig  # noqa: E402
from prism_cuda.integrations.heads import _of_part  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

RANKS = 2
SETTINGS: dict[str, PrismConfig] = {
    "exact": PrismConfig(top_p=1.0, dense_below=0, block_size=64),
    "per-head": PrismConfig(
        top_p=[0.3, 0.3, 0.3, 1.0], keep_above=1.0, dense_below=0, block_size=64
    ),
    "dense-last": PrismConfig(
        top_p=0.3, keep_above=1.0, dense_below=0, block_size=64, dense_heads=(3,)
    ),
    "dense-second": PrismConfig(
        top_p=0.3, keep_above=1.0, dense_below=0, block_size=64, dense_heads=(1,)
    ),
}


def test_settings_of_a_part_of_the_heads() -> None:
    config = PrismConfig(
        top_p=(0.1, 0.2, 0.3, 0.4), bands=[(16, 32), (16, 48)] * 2, dense_heads=(1, 2)
    )
    part = _of_part(config, 2, 2, 4)
    assert part.top_p == (0.3, 0.4) and part.dense_heads == (0,)
    assert part.bands_per_head() == ((16, 32), (16, 48))
    assert _of_part(config, 0, 4, 4) is config
    with pytest.raises(ValueError, match="dense_heads names head 9; expected less than 4"):
        _of_part(PrismConfig(dense_heads=(9,)), 0, 2, 4)
    with pytest.raises(ValueError, match="top_p has 2 entries; expected one for all heads or 4"):
        _of_part(PrismConfig(top_p=(0.1, 0.2)), 0, 2, 4)


def run(model: Any, name: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the density of every head in the first layer."""
    model.set_attn_implementation(f"prism-{name}")
    with torch.no_grad(), prism_cuda.record(masks=True) as recording:
        logits = model(ids).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    assert all(call.path == "prism" for call in recording.calls)
    mask = recording.calls[0].mask
    assert mask is not None
    return logits, mask.density_per_head()[0]


def split_by_hand(model: Any) -> None:
    """As tp_plan="auto" splits attention, without the accelerate package that it needs."""
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    split = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    plan = {f"model.layers.*.self_attn.{name}": style for name, style in split.items()}
    parallelize_module(model, mesh, plan | {"model.layers.*.self_attn.o_proj": RowwiseParallel()})


def rank_main(rank: int, folder: str, port: int, tp_plan: str | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    for name, config in SETTINGS.items():
        prism_cuda.register(config, f"prism-{name}")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="prism-exact", dtype=torch.float32, tp_plan=tp_plan
    ).eval()
    if tp_plan is None:
        split_by_hand(model)
    found = {}
    for name in SETTINGS:
        found[name] = run(model, name, torch.load(f"{folder}/ids.pt"))
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("tp_plan", [None, "auto"])
def test_two_ranks_do_what_one_process_does(tmp_path: Path, tp_plan: str | None) -> None:
    if tp_plan:
        pytest.importorskip("accelerate", reason="tp_plan needs the accelerate package")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**TINY), attn_implementation="eager"
    )
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(10)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (1, 600))
    torch.save(ids, tmp_path / "ids.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (str(tmp_path), port, tp_plan), RANKS)

    of_ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    for name, config in SETTINGS.items():
        prism_cuda.register(config, f"prism-{name}")
        logits, density = run(model, name, ids)
        for found in of_ranks:
            torch.testing.assert_close(found[name][0], logits, atol=3e-5, rtol=1e-4)
        torch.testing.assert_close(torch.cat([found[name][1] for found in of_ranks]), density)
