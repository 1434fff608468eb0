"""PrismConfig: validation and the bands it resolves to."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prism_cuda import bands
from prism_cuda.config import PrismConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 32),
        ("estimator", "fine"),
        ("block_size", (64, 128)),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("top_p", float("nan")),
        ("keep_above", 0.0),
        ("keep_above", 1.01),
        ("keep_above", float("nan")),
        ("bands", "wide"),
        ("bands", (64,)),
        ("bands", (64.0, 96)),
        ("rope_theta", 1.0),
        ("rope_layout", "neox"),
        ("keep_sink", -1),
        ("keep_recent", 1.5),
        ("dense_below", -1),
        ("inv_freq", []),
    ],
)
def test_errors_name_field_value_and_allowed(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*; expected"):
        PrismConfig(**{field: value})


@pytest.mark.parametrize(
    ("block_size", "sizes"), [(128, (128, 128)), (64, (64, 64)), ((128, 64), (128, 64))]
)
def test_block_sizes(block_size, sizes):
    assert PrismConfig(block_size=block_size).block_sizes == sizes


def test_is_frozen_and_hashable():
    config = PrismConfig(inv_freq=torch.tensor([1.0, 0.1]))
    assert config.inv_freq == pytest.approx((1.0, 0.1))
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_p = 0.5


def test_resolved_bands():
    assert PrismConfig().resolve_bands(128) == bands.from_dims(64, 96, 128)
    assert PrismConfig(bands=(32, 64)).resolve_bands(128) == bands.from_dims(32, 64, 128)
    explicit = bands.Bands((0, 8), (8, 64))
    assert PrismConfig(bands=explicit).resolve_bands(64) is explicit
    slow = PrismConfig(rope_theta=1e4, rope_layout="interleaved", block_size=64)
    assert slow.resolve_bands(128) == bands.split(1e4, 128, 64, "interleaved")
    frequencies = 1e4 ** -(torch.arange(0, 128, 2).double() / 128)
    by_frequency = PrismConfig(inv_freq=frequencies, rope_theta=1e6).resolve_bands(128)
    assert by_frequency == bands.split(1e4, 128)


def test_mixed_blocks_split_by_the_larger_one():
    mixed = PrismConfig(block_size=(128, 64), rope_theta=1e4)
    assert mixed.resolve_bands(128) == bands.split(1e4, 128, 128)


def test_bands_that_do_not_fit_the_head():
    with pytest.raises(ValueError, match="low is 96"):
        PrismConfig(bands=(64, 96)).resolve_bands(64)


def test_threshold_of_the_grid_follows_top_p():
    assert PrismConfig(top_p=0.9).threshold is None
    assert PrismConfig(top_p=0.9, keep_above=0.2).threshold == 0.2
    assert PrismConfig(top_p=0.9, estimator="grid").threshold == pytest.approx(0.01)
    assert PrismConfig(top_p=1.0, estimator="grid").threshold is None
    assert PrismConfig(top_p=0.9, keep_above=0.2, estimator="grid").threshold == 0.2
