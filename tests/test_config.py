"""PrismConfig: validation and the bands it resolves to."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import prism_cuda
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
        ("top_p", ()),
        ("top_p", (0.5, 1.5)),
        ("top_p", (0.5, float("nan"))),
        ("top_p", "0.9"),
        ("top_p", ("0.9",)),
        ("top_p", None),
        ("top_p", True),
        ("top_p", torch.tensor([[0.5]])),
        ("keep_above", 0.0),
        ("keep_above", 1.01),
        ("keep_above", float("nan")),
        ("bands", "wide"),
        ("bands", (64,)),
        ("bands", (64.0, 96)),
        ("bands", ()),
        ("bands", 64),
        ("bands", [64, 96, 32]),
        ("bands", ["auto", "wide"]),
        ("bands", [(64, 96), (64,)]),
        ("bands", {"high_ranges": [0, 8]}),
        ("bands", [None]),
        ("rope_theta", 1.0),
        ("rope_layout", "neox"),
        ("keep_sink", -1),
        ("keep_recent", 1.5),
        ("dense_below", -1),
        ("inv_freq", []),
        ("dense_heads", 3),
        ("dense_heads", (0, -1)),
        ("dense_heads", (0.5,)),
        ("dense_heads", "01"),
        ("dense_layers", -1),
        ("dense_layers", True),
        ("dense_layers", (1, -2)),
        ("dense_layers", "first"),
        ("layers", {-1: {"top_p": 0.5}}),
        ("layers", {0: 0.5}),
        ("layers", {"first": {"top_p": 0.5}}),
        ("layers", [0.5, 0.9]),
        ("layers", (0.5,)),
    ],
)
def test_errors_name_field_value_and_allowed(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*; expected"):
        PrismConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 2.0}, r"layers\[3\] is wrong: PrismConfig: top_p is 2.0; expected"),
        ({"dense_heads": 1}, r"layers\[3\] is wrong: PrismConfig: dense_heads is 1; expected"),
        ({"block_size": 64}, r"layers\[3\] sets 'block_size'; expected \('estimator', 'top_p'"),
        (
            {"estimator": "fine"},
            r"layers\[3\] is wrong: PrismConfig: estimator is 'fine'; expected",
        ),
        ({"bands": [(64, 96), 3]}, r"layers\[3\] is wrong: PrismConfig: bands is .*; expected"),
        ({"topp": 0.5}, r"layers\[3\] sets 'topp'; expected \('estimator', 'top_p'"),
    ],
)
def test_wrong_settings_of_a_layer_name_it(fields, message):
    with pytest.raises(ValueError, match=message):
        PrismConfig(layers={1: {"top_p": 0.5}, 3: fields})


def test_settings_of_layers():
    config = PrismConfig(
        top_p=0.9,
        block_size=64,
        dense_layers=2,
        layers={
            3: {"top_p": [0.5, 0.7], "bands": (16, 32)},
            5: {"keep_sink": 4, "estimator": "grid"},
        },
    )
    assert [config.is_dense_layer(layer) for layer in (None, 0, 1, 2)] == [False, True, True, False]
    assert config.for_layer(None) is config and config.for_layer(4) is config
    third = config.for_layer(3)
    assert (third.top_p, third.bands, third.block_size) == ((0.5, 0.7), (16, 32), 64)
    assert (config.for_layer(5).top_p, config.for_layer(5).keep_sink) == (0.9, 4)
    assert (config.for_layer(5).estimator_of(64), third.estimator_of(64)) == ("grid", "bands")
    # What a layer does not set follows the config it is in.
    assert dataclasses.replace(config, top_p=0.8).for_layer(5).top_p == 0.8
    assert hash(config) == hash(dataclasses.replace(config))
    chosen = PrismConfig(dense_layers={4, 1})
    assert chosen.dense_layers == (1, 4)
    assert [chosen.is_dense_layer(layer) for layer in (0, 1, 4)] == [False, True, True]
    assert PrismConfig(dense_layers=range(2)).dense_layers == (0, 1)


def test_top_p_of_heads():
    assert PrismConfig(top_p=0.9).top_p_of_heads(4) == 0.9
    assert PrismConfig(top_p=[0.5, 0.5]).top_p_of_heads(2) == 0.5
    assert PrismConfig(top_p=torch.tensor([0.5, 0.25])).top_p_of_heads(2) == (0.5, 0.25)
    assert PrismConfig(top_p=0.9, dense_heads={2, 0}).top_p_of_heads(4) == (1.0, 0.9, 1.0, 0.9)
    assert PrismConfig(top_p=0.9, dense_heads=(1, 0)).top_p_of_heads(2) == 1.0
    with pytest.raises(ValueError, match="top_p has 2 values; expected one number or 4"):
        PrismConfig(top_p=(0.5, 0.6)).top_p_of_heads(4)
    with pytest.raises(ValueError, match="dense_heads names head 4; expected less than 4"):
        PrismConfig(dense_heads=(0, 4)).top_p_of_heads(4)


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
        setattr(config, "top_p", 0.5)  # noqa: B010


def test_resolved_bands():
    assert PrismConfig().resolve_bands(128) == bands.from_dims(64, 96, 128)
    assert PrismConfig(bands=(32, 64)).resolve_bands(128) == bands.from_dims(32, 64, 128)
    explicit = bands.Bands((0, 8), (8, 64))
    assert PrismConfig(bands=explicit).resolve_bands(64) == explicit
    slow = PrismConfig(rope_theta=1e4, rope_layout="interleaved", block_size=64)
    assert slow.resolve_bands(128) == bands.split(1e4, 128, 64, "interleaved")
    frequencies = 1e4 ** -(torch.arange(0, 128, 2).double() / 128)
    by_frequency = PrismConfig(inv_freq=frequencies, rope_theta=1e6).resolve_bands(128)
    assert by_frequency == bands.split(1e4, 128)


def test_bands_of_every_head():
    explicit = bands.Bands((0, 8), (8, 64))
    config = PrismConfig(bands=["auto", (32, 64), explicit])
    assert config.bands == ("auto", (32, 64), explicit)
    assert hash(config) == hash(dataclasses.replace(config))
    auto, narrow = bands.split(1e6, 64), bands.from_dims(32, 64, 64)
    assert config.resolve_bands(64) == (auto, narrow, explicit)
    assert config.bands_per_head() == config.bands
    # Two heads with a pair each are told from one pair.
    assert PrismConfig(bands=((32, 64), (32, 64))).resolve_bands(64) == (narrow, narrow)
    for one in ("auto", (32, 64), explicit):
        assert PrismConfig(bands=one).bands_per_head() is None
    layered = PrismConfig(layers={2: {"bands": [(32, 64), "auto"]}, 3: {"bands": (32, 64)}})
    assert layered.for_layer(2).resolve_bands(64) == (narrow, auto)
    assert layered.for_layer(3).resolve_bands(64) == narrow
    assert layered.for_layer(1).resolve_bands(64) == auto
    with pytest.raises(ValueError, match="high is 96"):
        PrismConfig(bands=[(32, 64), (96, 64)]).resolve_bands(64)


def test_mixed_blocks_split_by_the_larger_one():
    mixed = PrismConfig(block_size=(128, 64), rope_theta=1e4)
    assert mixed.resolve_bands(128) == bands.split(1e4, 128, 128)


def test_bands_that_do_not_fit_the_head():
    with pytest.raises(ValueError, match="low is 96"):
        PrismConfig(bands=(64, 96)).resolve_bands(64)


def test_threshold_of_the_grid_follows_top_p():
    assert PrismConfig().threshold(0.9, "bands") is None
    assert PrismConfig().threshold(0.9, "grid") == pytest.approx(0.01)
    assert PrismConfig().threshold(1.0, "grid") is None
    for estimator in ("bands", "grid"):
        assert PrismConfig(keep_above=0.2).threshold(0.9, estimator) == 0.2


def test_the_estimator_is_the_grid_unless_the_bands_are_set_or_heads_are_large():
    assert [PrismConfig().estimator_of(dim) for dim in (8, 128, 136)] == ["grid", "grid", "bands"]
    assert PrismConfig(bands=(16, 32)).estimator_of(64) == "bands"
    assert PrismConfig(bands=(16, 32), estimator="grid").estimator_of(64) == "grid"
    assert PrismConfig(estimator="bands").estimator_of(64) == "bands"


FULL = PrismConfig(
    block_size=(64, 64),
    estimator="bands",
    top_p=[0.5, 0.75],
    keep_above=0.25,
    bands=["auto", (16, 32)],
    rope_theta=1e4,
    inv_freq=[1.0, 0.5],
    rope_layout="interleaved",
    dense_heads=(1,),
    dense_layers=(0, 3),
    layers={2: {"top_p": 0.5, "bands": bands.Bands((0, 8), (8, 64))}, 5: {"dense_heads": {1, 0}}},
)


@pytest.mark.parametrize("config", [PrismConfig(), FULL], ids=["default", "full"])
def test_settings_come_back_from_json(config, tmp_path):
    for settings in (config.to_dict(), dataclasses.asdict(config)):
        again = PrismConfig(**json.loads(json.dumps(settings)))
        assert again == config and hash(again) == hash(config)
    assert PrismConfig(**dataclasses.asdict(config)) == config
    config.save(tmp_path / "prism.json")
    assert PrismConfig.load(tmp_path / "prism.json") == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_file_of_settings_is_checked(tmp_path):
    path = tmp_path / "prism.json"
    for text, message in (
        ('{"topp": 0.9}', r"prism.json sets topp; expected \('block_size'"),
        ("[1]", "holds a list; expected an object"),
        ("{", "prism.json is not JSON"),
        ('{"top_p": 2}', "top_p is 2; expected"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            PrismConfig.load(path)
    path.write_text('{"top_p": 0.9}')
    assert PrismConfig.load(path) == PrismConfig(top_p=0.9)


def test_numbers_and_sequences_of_other_libraries():
    settings: dict[str, Any] = dict(
        block_size=np.array([128, 64]),
        top_p=np.float32(0.5),
        keep_above=np.float64(0.25),
        bands=np.array([[16, 32], [32, 48]]),
        inv_freq=np.array([1.0, 0.5]),
        keep_sink=np.int64(2),
        dense_below=torch.tensor(100),
        dense_heads=np.array([1, 0]),
        dense_layers=[np.int32(3)],
        layers={"7": {"top_p": np.array([0.5, 1.0])}, np.int64(8): {"keep_recent": np.int8(2)}},
    )
    config = PrismConfig(**settings)
    assert config == PrismConfig(
        top_p=0.5,
        keep_above=0.25,
        bands=((16, 32), (32, 48)),
        inv_freq=(1.0, 0.5),
        keep_sink=2,
        dense_below=100,
        dense_heads=(0, 1),
        dense_layers=(3,),
        layers={7: {"top_p": (0.5, 1.0)}, 8: {"keep_recent": 2}},
    )
    assert type(config.top_p) is float and type(config.keep_sink) is int
    pairs: Any = ([64, 96], [[64, 96], (64, 96)])
    assert PrismConfig(bands=pairs[0]).bands == (64, 96)
    assert PrismConfig(bands=pairs[1]).bands == ((64, 96), (64, 96))


def test_layers_without_a_number_are_not_dense():
    for config in (PrismConfig(), PrismConfig(dense_layers=2), PrismConfig(dense_layers=(0, 1))):
        assert not config.is_dense_layer(-1) and not config.is_dense_layer(None)


def test_no_heads_need_no_settings():
    assert PrismConfig().top_p_of_heads(0) == 0.95
    with pytest.raises(ValueError, match="top_p has 2 values; expected one number or 0"):
        PrismConfig(top_p=(0.5, 0.6)).top_p_of_heads(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda q, config: prism_cuda.prefill(q, q, q, config=config),
        lambda q, config: prism_cuda.select_blocks(q, q, config=config),
        lambda q, config: prism_cuda.dispatch(9, 9, 64, q.dtype, "cpu", config),
        lambda q, config: prism_cuda.ChunkedPrefill(1, 1, 64, 9, config=config, device="cpu"),
        lambda q, config: prism_cuda.register(config, "never"),
    ],
    ids=["prefill", "select_blocks", "dispatch", "ChunkedPrefill", "register"],
)
@pytest.mark.parametrize("config", [{}, {"top_p": 0.9}, 0.9])
def test_what_is_no_config_is_refused(call, config):
    with pytest.raises(TypeError, match=r"config is .*; expected a PrismConfig or None"):
        call(torch.randn(1, 1, 9, 64), config)


def test_with_bands_changes_nothing_else():
    explicit = bands.Bands((0, 8), (8, 64))
    assert FULL.with_bands(explicit) == dataclasses.replace(FULL, bands=explicit)
