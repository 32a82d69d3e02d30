"""Caches of transformers with room ahead, so that a token is written where it belongs.

A dynamic layer joins its tensors anew for every token. Here its keys and values become views of a
buffer with room behind them: everything that transformers does with them (cropping, reordering,
joining) works on the views as before. What was visible once is never written again: a layer whose
tensors are not the views that were last put there gets a new buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

_ROOM = "_moyu_room"
LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)


@dataclass
class _Room:
    """Buffers [batch, heads, places, head_dim], and the views of them that the layer has."""

    keys: Tensor
    values: Tensor
    seen: tuple[Tensor, Tensor]
    begin: int
    """Place of the views' first token."""

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of a cache get a room of their own


@dataclass(frozen=True)
class Places:
    """Where a layer's tokens lie: addresses of keys and values, and elements from one sequence and
    head to the next."""

    keys: int
    values: int
    sequence_stride: int
    head_stride: int


class NoRoom(Exception):
    """Why a cache cannot be written by the compiled step, in a few words."""


def check_cache(cache: Any, layers: int) -> None:
    """Raise NoRoom for caches other than transformers' own dynamic and static ones."""
    if not isinstance(cache, (DynamicCache, StaticCache)) or cache.offloading:
        raise NoRoom(f"a cache of class {type(cache).__name__}")
    if len(cache.layers) != layers:
        raise NoRoom("a cache of another number of layers")
    for layer in cache.layers:
        if type(layer) not in LAYERS:
            raise NoRoom(f"a cache layer of class {type(layer).__name__}")
        if not layer.is_initialized:
            raise NoRoom("an empty cache")


def stored(layer: Any) -> int:
    """Tokens that the layer holds, of which a sliding one has dropped the others."""
    if type(layer) is StaticLayer:
        return int(layer.cumulative_length)
    return int(layer.keys.shape[-2])


def make_room(layer: Any, tokens: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> Places:
    """Room for `tokens` more; shape: (batch, heads, head_dim). NoRoom where the layer's tensors are
    of another shape or dtype."""
    keys, values = layer.keys, layer.values
    batch, heads, size = shape
    for tensor in (keys, values):
        if tensor.dtype != dtype or not tensor.is_cpu:
            raise NoRoom("a cache of another dtype or device")
        if (*tensor.shape[:2], tensor.shape[3]) != shape:
            raise NoRoom("a cache of another shape")
    if type(layer) is StaticLayer:
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise NoRoom("a static cache that is not contiguous")
        if stored(layer) + tokens > keys.shape[2]:
            raise NoRoom("a static cache that is full")
        return Places(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1))
    if type(layer) is DynamicSlidingWindowLayer and layer.record_past:
        raise NoRoom("a sliding cache that keeps what it drops")
    past = keys.shape[2]
    room = getattr(layer, _ROOM, None)
    if (
        room is None
        or room.seen[0] is not keys
        or room.seen[1] is not values
        or room.begin + past + tokens > room.keys.shape[2]
    ):
        places = past + tokens + max(256, past // 4)
        buffers = []
        for tensor in (keys, values):
            buffer = tensor.new_empty(batch, heads, places, size)
            buffer[:, :, :past] = tensor
            buffers.append(buffer)
        room = _Room(buffers[0], buffers[1], (keys, values), 0)
        setattr(layer, _ROOM, room)
    offset = room.begin * size * keys.element_size()
    stride = room.keys.stride()
    return Places(
        room.keys.data_ptr() + offset, room.values.data_ptr() + offset, stride[0], stride[1]
    )


def extend(layer: Any, tokens: int) -> None:
    """The tokens were written behind those that the layer holds: let it show them."""
    if type(layer) is StaticLayer:
        layer.cumulative_length.add_(tokens)
        return
    room, drop = getattr(layer, _ROOM), 0
    end = layer.keys.shape[2] + tokens
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length += tokens
        drop = max(0, end - (layer.sliding_window - 1))
    end += room.begin
    room.begin += drop
    layer.keys = room.keys[:, :, room.begin : end]
    layer.values = room.values[:, :, room.begin : end]
    room.seen = (layer.keys, layer.values)
