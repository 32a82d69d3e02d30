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


@dataclass(frozen=True)
class Places:
    """Where a layer's tokens lie: addresses of keys and values, and elements from one sequence and
    head to the next."""

    keys: int
    values: int
    sequence_stride: int
    head_stride: int


class _Room:
    """Buffers [batch, heads, places, head_dim] of a dynamic layer, of whose places [begin, end) are
    the layer's keys and values; shape: (batch, heads, head_dim)."""

    def __init__(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        batch, heads, self.end, size = keys.shape
        self.shape = (batch, heads, size)
        self.begin = 0
        self.most = self.end + tokens + max(256, self.end // 4)
        self.buffers = [t.new_empty(batch, heads, self.most, size) for t in (keys, values)]
        for buffer, tensor in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, : self.end] = tensor
        self.keys, self.values = keys, values  # as the layer has them
        self.places = self._places()

    def _places(self) -> Places:
        offset = self.begin * self.shape[2] * self.keys.element_size()
        keys, values = (buffer.data_ptr() + offset for buffer in self.buffers)
        return Places(keys, values, self.buffers[0].stride(0), self.buffers[0].stride(1))

    def fits(self, layer: Any, tokens: int, shape: tuple[int, int, int]) -> bool:
        return (
            self.keys is layer.keys
            and self.values is layer.values
            and self.end + tokens <= self.most
            and self.shape == shape
        )

    def extend(self, tokens: int, keep: int | None) -> None:
        """Let tokens in, and the first ones out of more than `keep`; the views stay."""
        self.end += tokens
        if keep is not None and self.end - self.begin > keep:
            self.begin = self.end - keep
            self.places = self._places()

    def show(self, layer: Any) -> None:
        """Let the layer have views of what is there."""
        self.keys, self.values = (
            buffer.narrow(2, self.begin, self.end - self.begin) for buffer in self.buffers
        )
        layer.keys, layer.values = self.keys, self.values

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of a cache get a room of their own


class NoRoom(Exception):
    """Why a cache cannot be written by the compiled step, in a few words."""


def check_cache(cache: Any, layers: int) -> None:
    """Raise NoRoom for caches other than transformers' own dynamic and static ones."""
    if not isinstance(cache, (DynamicCache, StaticCache)) or cache.offloading:
        raise NoRoom(f"a cache of class {type(cache).__name__}")
    if len(cache.layers) != layers:
        raise NoRoom("a cache of another number of layers")


def make_room(
    layer: Any, tokens: int, dtype: torch.dtype, shape: tuple[int, int, int]
) -> tuple[int, Places]:
    """Room for `tokens` more: how many the layer holds, and where; shape: (batch, heads, head_dim).
    NoRoom where the layer is of another kind, or its tensors of another shape or dtype."""
    if getattr(layer, "record_past", False):
        raise NoRoom("a sliding cache that keeps what it drops")
    room = getattr(layer, _ROOM, None)
    if room is not None and room.fits(layer, tokens, shape):
        return room.end - room.begin, room.places
    if type(layer) not in LAYERS:
        raise NoRoom(f"a cache layer of class {type(layer).__name__}")
    if not layer.is_initialized:
        raise NoRoom("an empty cache layer")
    for tensor in (layer.keys, layer.values):
        if tensor.dtype != dtype or not tensor.is_cpu:
            raise NoRoom("a cache of another dtype or device")
        if (*tensor.shape[:2], tensor.shape[3]) != shape:
            raise NoRoom("a cache of another shape")
    if type(layer) is StaticLayer:
        return _static(layer, tokens)
    room = _Room(layer.keys, layer.values, tokens)
    setattr(layer, _ROOM, room)
    return room.end, room.places


def _static(layer: StaticLayer, tokens: int) -> tuple[int, Places]:
    keys: Any = layer.keys
    values: Any = layer.values
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise NoRoom("a static cache that is not contiguous")
    held = int(layer.cumulative_length)
    if held + tokens > keys.shape[2]:
        raise NoRoom("a static cache that is full")
    return held, Places(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1))


def extend(layer: Any, tokens: int, show: bool = True) -> None:
    """The tokens were written behind those that the layer holds. Without `show` it has the views of
    before, until `show_all`."""
    if type(layer) is StaticLayer:
        layer.cumulative_length.add_(tokens)
        return
    keep = None
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length += tokens
        keep = layer.sliding_window - 1
    room = getattr(layer, _ROOM)
    room.extend(tokens, keep)
    if show:
        room.show(layer)


def show_all(cache: Any) -> None:
    """Let the layers of a cache show all of their tokens."""
    for layer in cache.layers:
        room = getattr(layer, _ROOM, None)
        if room is not None and room.keys is layer.keys and room.values is layer.values:
            room.show(layer)
