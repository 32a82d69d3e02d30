"""The side-car file of shadows: what comes back from it, and what is refused."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moyu_ext.errors import ArtifactError, MoyuError
from moyu_ext.shadow.store import FILE, Shadows


@pytest.fixture
def saved(tiny: Callable[..., torch.nn.Module], tmp_path: Path) -> tuple[Shadows, Path]:
    shadows = Shadows.build(tiny("llama"), 2)
    shadows.save_pretrained(tmp_path)
    return shadows, tmp_path


def test_saved_shadows_come_back_by_memory_map(saved: tuple[Shadows, Path]) -> None:
    shadows, folder = saved
    back = Shadows.from_pretrained(folder)
    assert back.bits == shadows.bits == ((2, 2),) * 3
    assert back.nbytes == shadows.nbytes
    assert back.fingerprint == shadows.fingerprint
    assert back.fitted is shadows.fitted is False and back.key == ""
    for a, b in zip(shadows.layers, back.layers, strict=True):
        assert torch.equal(a.data, b.data) and a.d == b.d
        assert b.data.data_ptr() % 64 == 0
    assert os.listdir(folder) == [FILE]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/maps")
def test_the_file_is_mapped_rather_than_read(saved: tuple[Shadows, Path]) -> None:
    _, folder = saved

    def maps() -> list[tuple[int, int]]:
        with open("/proc/self/maps") as lines:
            mine = [line.split()[0] for line in lines if line.rstrip().endswith(str(folder / FILE))]
        return [tuple(int(end, 16) for end in part.split("-")) for part in mine]  # type: ignore[misc]

    assert maps() == []
    back = Shadows.from_pretrained(folder, verify=False)
    found = maps()
    for shadow in back.layers:
        begin = shadow.data.data_ptr()
        assert any(low <= begin < begin + shadow.data.numel() <= high for low, high in found)


def test_file_is_safetensors(saved: tuple[Shadows, Path]) -> None:
    from safetensors.torch import load_file

    shadows, folder = saved
    tensors = load_file(folder / FILE)
    assert sorted(tensors) == ["layers.0", "layers.1", "layers.2"]
    assert torch.equal(tensors["layers.1"], shadows.layers[1].data)


def test_ungated_and_mixed_shadows_can_be_saved(
    tiny: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    opt = Shadows.build(tiny("opt"), 3)
    assert opt.bits == ((3, 3),) * 3 and not opt.layers[0].gated
    mixed = Shadows.build(tiny("llama"), [(2, 1), (4, 4), (1, 3)])
    for name, shadows in (("opt", opt), ("mixed", mixed)):
        shadows.save_pretrained(tmp_path / name)
        back = Shadows.from_pretrained(tmp_path / name)
        assert back.bits == shadows.bits
        for a, b in zip(shadows.layers, back.layers, strict=True):
            assert torch.equal(a.data, b.data)


@pytest.mark.parametrize("damage", ["missing", "cut", "short", "flip", "header", "version", "long"])
def test_damaged_files_are_refused(saved: tuple[Shadows, Path], damage: str) -> None:
    path = saved[1] / FILE
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        if damage == "cut":
            content = content[:-64]
        elif damage == "short":
            content = content[:100]
        elif damage == "flip":
            content[-1000] ^= 4
        elif damage == "header":
            content[8:40] = b"x" * 32
        elif damage == "version":
            content = content.replace(b'format_version\\": 3', b'format_version\\": 7')
        elif damage == "long":
            content += b"\0" * 64
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=FILE) as caught:
        Shadows.from_pretrained(saved[1])
    assert isinstance(caught.value, MoyuError)


def rewrite(path: Path, change: Callable[[dict, dict], None]) -> None:
    """The file with another header: change(header, what it says of the shadows)."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["moyu"])
    change(header, about)
    header["__metadata__"]["moyu"] = json.dumps(about)
    text = json.dumps(header).encode()
    text += b" " * (length - len(text))
    path.write_bytes(content[:8] + text + content[8 + length :])


@pytest.mark.parametrize(
    "shape", [[96, 128], [96 * 192], [96, 128, 1], [0], "96", None, [96, "128"], [96, -128], 7]
)
def test_header_that_lies_about_shapes_is_refused(
    saved: tuple[Shadows, Path], shape: object
) -> None:
    def change(header: dict, about: dict) -> None:
        assert header["layers.0"]["shape"] != shape
        header["layers.0"]["shape"] = shape

    rewrite(saved[1] / FILE, change)
    with pytest.raises(ArtifactError, match=FILE):
        Shadows.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "about",
    [
        {"layers": None},
        {"layers": 3},
        {"layers": [[32, 2, 2]]},
        {"layers": [[32, 2]] * 3},
        {"layers": [[512, 2, 2]] * 3},
        {"layers": [["32", 2, 2]] * 3},
        {"layers": [[32.0, 2, 2]] * 3},
        {"layers": [[32, 2.0, 2]] * 3},
        {"layers": [[32, 2, 2]] * 4, "sha256": ["0"] * 4},
        {"sha256": None},
        {"fingerprint": None},
        {"fitted": 1},
        {"format_version": "3"},
    ],
)
def test_header_that_says_something_else_is_refused(
    saved: tuple[Shadows, Path], about: dict[str, object]
) -> None:
    rewrite(saved[1] / FILE, lambda _, was: was.update(about))
    with pytest.raises(ArtifactError, match="no shadows that can be used"):
        Shadows.from_pretrained(saved[1])


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for metadata in (None, {"moyu": "[]"}, {"moyu": "{"}):
        save_file({"layers.0": torch.zeros(2, 128)}, tmp_path / FILE, metadata)
        with pytest.raises(ArtifactError, match="header is not ours"):
            Shadows.from_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(ArtifactError, match=f"cannot read .*{FILE}"):
        Shadows.from_pretrained(tmp_path)
