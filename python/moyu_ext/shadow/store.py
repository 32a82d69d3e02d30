"""Shadows of a whole model, and their side-car file, which is loaded by memory map.

The file is a safetensors file: a uint8 tensor [f, record bytes] per layer, behind them float32
[3, f] of those layers that know their costs, and a header padded with spaces to whole pages, so
that every record lies on a 64-byte boundary of the mapped file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._artifact import folder_of
from .._files import write_atomically
from .._progress import steps
from ..errors import ArtifactError, ConfigurationError
from ..models.families import find_mlps
from ..models.fingerprint import fingerprint
from ..models.forward import answer_mlps, require_plain
from ..models.text import encode_texts, longest_window, make_batch, read_texts, write_own
from ..models.weights import MlpWeights
from .build import build_shadow
from .feedback import build_for
from .pack import BITS, Shadow, pair_of, record_bytes, unpack
from .reference import dequantise

FORMAT_VERSION = 3
FILE = "moyu_shadows.safetensors"
_PAGE = 4096
_SAMPLES = 8
# Tokens of each text that a model writes to fit shadows to: many beginnings in few steps.
_WRITTEN = 64


@dataclass(frozen=True, eq=False, repr=False)
class Shadows:
    """The shadows of a model's MLPs, layer by layer, and the fingerprint of its weights.

    fitted: rounded by `fit` with regard to what the MLPs get, and not by `build`.
    """

    layers: tuple[Shadow, ...]
    fingerprint: str
    fitted: bool = False

    @classmethod
    def build(cls, model: nn.Module, bits: Any = 2) -> Shadows:
        """Round all MLPs of a model (patched or not) to the nearest levels, as `QRIDA` does itself.

        bits: 1..4, or a pair (gate, up), or a list with one of these per layer. Raises
        ConfigurationError for other bits, UnsupportedModelError for a model without MLPs of a known
        family.
        """
        sites = find_mlps(model)
        pairs = _pairs(bits, len(sites))
        with torch.no_grad():
            layers = [build_shadow(site.weights(), *pairs[site.index]) for site in sites]
        return cls(tuple(layers), fingerprint(model))

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        bits: Any = 2,
        tokenizer: Any = None,
        texts: Sequence[str] | str | os.PathLike[str] | None = None,
        *,
        max_tokens: int = 4096,
        seed: int = 0,
        progress: bool = True,
    ) -> Shadows:
        """The same, better: rounded so that errors cancel for what each MLP gets as input.

        See `moyu_ext.shadow.feedback`. What they get comes from one forward over `max_tokens`
        tokens of `texts`, or of short texts that the model writes where there are none (which needs
        no tokenizer). Size and speed in use are those of `build`. Worth saving: it takes seconds
        for a small model, and minutes at the size of LLaMA-2-7B on two cores. progress: a bar on
        stderr, if that is a terminal.

        Raises ConfigurationError for bits or text that cannot be used, UnsupportedModelError for a
        model without MLPs of a known family, PatchStateError for a patched one or one in training
        mode.
        """
        sites = find_mlps(model)
        pairs = _pairs(bits, len(sites))
        require_plain(model, sites)
        layers: list[Shadow] = []
        with torch.no_grad(), steps("shadows", progress) as step:
            if texts is None:
                step("the model writes text", 0, len(sites))
                window = min(_WRITTEN, longest_window(model))
                rows = write_own(model, tokenizer, max_tokens, window, seed)
            else:
                window = longest_window(model)
                rows = encode_texts(tokenizer, read_texts(texts, max_tokens), max_tokens, window)

            def visit(index: int, x: Tensor) -> Tensor:
                step(f"layer {index + 1} of {len(sites)}", index, len(sites))
                weights = sites[index].weights()
                layers.append(build_for(x, weights, *pairs[index]))
                return weights.output(x)

            answer_mlps(model, sites, make_batch(model, rows, max_tokens, 1), visit)
        return cls(tuple(layers), fingerprint(model), fitted=True)

    @functools.cached_property
    def key(self) -> str:
        """What tells fitted shadows from others: a digest of their bytes; "" for those of `build`,
        which follow from the weights."""
        if not self.fitted:
            return ""
        digest = hashlib.sha256()
        for layer in self.layers:
            for tensor in _tensors(layer):
                digest.update(_bytes(tensor))
        return digest.hexdigest()[:32]

    @property
    def bits(self) -> tuple[tuple[int, int], ...]:
        """(gate, up) of each layer; up's twice where the MLP is ungated."""
        return tuple((s.bits_gate or s.bits_up, s.bits_up) for s in self.layers)

    @property
    def nbytes(self) -> int:
        """Memory of all shadows, in bytes."""
        return sum(shadow.data.numel() for shadow in self.layers)

    def check(self, layers: int, model_fingerprint: Callable[[], str]) -> None:
        """Raise ConfigurationError or ArtifactError unless these are the shadows of this model."""
        if len(self.layers) != layers:
            raise ConfigurationError(
                f"shadows have {len(self.layers)} layers, the model has {layers} MLPs; build them "
                "from this model"
            )
        actual = model_fingerprint()
        if actual != self.fingerprint:
            raise ArtifactError(
                f"shadows were built from other weights: their fingerprint is {self.fingerprint}, "
                f"this model's is {actual}; build them from this model"
            )

    def layer(self, index: int, weights: MlpWeights) -> Shadow:
        """The shadow of one layer, on the device of its weights.

        A few rows are compared with the weights, which may have been loaded after `check`.
        Raises ArtifactError where they differ.
        """
        shadow = self.layers[index]
        same = (shadow.d, shadow.gated, len(shadow.data)) == (weights.d, weights.gated, weights.f)
        if not same or not _alike(shadow, weights):
            raise ArtifactError(
                f"the shadow of layer {index} was built from other weights than the model's; build "
                "it from this model"
            )
        data = shadow.data.to(weights.device)
        costs = None if shadow.costs is None else shadow.costs.to(weights.device)
        return Shadow(data, shadow.d, shadow.bits_gate, shadow.bits_up, costs)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the side-car file into `directory`, atomically."""
        folder = folder_of(directory, "shadows")
        folder.mkdir(parents=True, exist_ok=True)
        tensors, offset = {}, 0
        digests = [_digest(shadow) for shadow in self.layers]
        named = [(f"layers.{i}", "U8", shadow.data) for i, shadow in enumerate(self.layers)]
        named += [
            (f"costs.{i}", "F32", shadow.costs)
            for i, shadow in enumerate(self.layers)
            if shadow.costs is not None
        ]
        for name, dtype, tensor in named:
            shape, end = list(tensor.shape), offset + tensor.nbytes
            tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        about = {
            "kind": "moyu shadows",
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "fitted": self.fitted,
            "layers": [[s.d, s.bits_gate, s.bits_up] for s in self.layers],
            "sha256": digests,
        }
        header = json.dumps({"__metadata__": {"moyu": json.dumps(about)}, **tensors}).encode()
        header += b" " * (-(8 + len(header)) % _PAGE)
        start = [len(header).to_bytes(8, "little"), header]
        write_atomically(folder / FILE, chain(start, (_bytes(tensor) for _, _, tensor in named)))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, verify: bool = True) -> Shadows:
        """Map the side-car file of `directory` into memory.

        verify: compare the checksums, which reads the file once. Raises ArtifactError where the
        file is missing, truncated, corrupt, or of a format that this version does not read,
        ConfigurationError where `directory` is no path.
        """
        path = folder_of(directory, "shadows") / FILE
        about, tensors = _open(path)
        layers = []
        for index, ((data, costs), (d, bits_gate, bits_up)) in enumerate(
            zip(tensors, about["layers"], strict=True)
        ):
            width = record_bytes(d, bits_gate, bits_up)
            if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != width:
                raise _bad(
                    path,
                    f"layer {index} is {data.dtype} {list(data.shape)}, expected bytes [neurons, "
                    f"{width}] for hidden size {d} and bits {bits_gate}, {bits_up}",
                )
            if costs is not None and (
                costs.dtype != torch.float32 or list(costs.shape) != [3, data.shape[0]]
            ):
                raise _bad(
                    path,
                    f"the costs of layer {index} are {costs.dtype} {list(costs.shape)}, expected "
                    f"float32 [3, {data.shape[0]}]",
                )
            layers.append(Shadow(data, d, bits_gate, bits_up, costs))
            if verify and _digest(layers[-1]) != about["sha256"][index]:
                raise _bad(path, f"the bytes of layer {index} do not match their checksum")
        return cls(tuple(layers), about["fingerprint"], about["fitted"])

    def __repr__(self) -> str:
        bits = sorted(set(self.bits))
        shown = bits[0] if len(bits) == 1 else bits
        return (
            f"Shadows(<{len(self.layers)} layers, bits {shown}>, "
            f"fingerprint={self.fingerprint!r}, fitted={self.fitted})"
        )


def _pairs(bits: Any, layers: int) -> list[tuple[int, int]]:
    """(gate, up) of each layer, from what `QRIDA` takes as bits."""
    pairs = [pair_of(b) for b in bits] if isinstance(bits, list) else [pair_of(bits)] * layers
    if len(pairs) != layers:
        raise ConfigurationError(
            f"bits has {len(pairs)} entries, the model has {layers} MLPs; pass one (gate, up) per "
            "layer, or one number or pair for all"
        )
    return pairs


def _tensors(shadow: Shadow) -> list[Tensor]:
    return [shadow.data] if shadow.costs is None else [shadow.data, shadow.costs]


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().numpy()
    return memoryview(array).cast("B")


def _digest(shadow: Shadow) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(shadow):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bad(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"{path} holds no shadows that can be used: {reason}; build them again")


def _open(path: Path) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor | None]]]:
    """What the file says of itself, and its layers' records and costs, mapped and not read."""
    try:
        with safe_open(path, framework="pt") as file:
            about = _check_about(json.loads((file.metadata() or {})["moyu"]))
            names = set(file.keys())
            return about, [
                (
                    file.get_tensor(f"layers.{i}"),
                    file.get_tensor(f"costs.{i}") if f"costs.{i}" in names else None,
                )
                for i in range(len(about["layers"]))
            ]
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path} ({error.strerror or error}); expected a folder written by "
            "Shadows.save_pretrained"
        ) from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _bad(path, f"it is truncated, or its header is not ours ({error})") from error


def _check_about(about: Any) -> Any:
    """`about` as it is. Raises ValueError, KeyError or TypeError where it is not as we write it."""
    if about["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"it has format version {about['format_version']!r}, this moyu_ext reads "
            f"{FORMAT_VERSION}"
        )
    for d, bits_gate, bits_up in about["layers"]:
        whole = {type(d), type(bits_gate), type(bits_up)} == {int}
        if not whole or d < 1 or bits_gate not in (0, *BITS) or bits_up not in BITS:
            raise ValueError(f"bits {bits_gate!r}, {bits_up!r} at hidden size {d!r}")
    if not len(about["layers"]) == len(about["sha256"]) > 0:
        raise ValueError("layers and checksums differ in number")
    if not isinstance(about["fitted"], bool) or not isinstance(about["fingerprint"], str):
        raise ValueError("fitted or fingerprint is something else")
    return about


def _alike(shadow: Shadow, weights: MlpWeights) -> bool:
    """Whether a few rows of the shadow point the way of the weights' rows."""
    f = weights.f
    rows = torch.arange(min(f, _SAMPLES)) * f // min(f, _SAMPLES)
    gate, up = unpack(Shadow(shadow.data[rows], shadow.d, shadow.bits_gate, shadow.bits_up))
    for matrix, name in ((gate, "gate"), (up, "up")):
        if matrix is not None and getattr(weights, name) is not None:
            exact = weights.rows(name, rows.to(weights.device)).float().cpu()
            rounded = dequantise(matrix)[:, : shadow.d]
            cosine = torch.nn.functional.cosine_similarity(exact, rounded, dim=1)
            # 0.8 at one bit, and near 0 for other weights; a row of zeros says nothing.
            if bool(((cosine < 0.5) & exact.any(1)).any()):
                return False
    return True
