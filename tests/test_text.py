"""Calibration text: lists, files, text that the model writes, and how it is cut."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from moyu_ext.calibration.calibrate import calibrate
from moyu_ext.errors import ConfigurationError
from moyu_ext.models import text as text_module
from test_calibrate import Letters, letters, tiny_llama


def test_windows_are_cut_and_counted() -> None:
    model = tiny_llama()  # 64 positions
    one = calibrate(model, Letters(), letters(1, 200), progress=False)
    assert one.tokens == 200
    assert calibrate(model, Letters(), letters(9, 50), max_tokens=77, progress=False).tokens == 77
    rows = [list(range(10)), list(range(20, 25)), list(range(30, 42))]
    cut = text_module.windows(rows, 24, 5)
    # The beginning of every text first, then what follows; the last window meets max_tokens.
    assert cut == [
        [0, 1, 2, 3, 4], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34],
        [5, 6, 7, 8, 9], [35, 36, 37, 38],
    ]  # fmt: skip


def test_one_long_text_among_short_ones_is_not_padded_away() -> None:
    model = tiny_llama(max_position_embeddings=512)
    rows = [Letters().encode(text) for text in [*letters(1, 500), *letters(40, 5, seed=1)]]
    batch = text_module.make_batch(model, rows, 4096, 1)
    assert sum(batch.lengths) == 700
    assert batch.real.sum() == 700
    assert batch.ids.numel() <= 4 * 700
    kept = sorted(t for row, real in zip(batch.ids, batch.real, strict=True) for t in row[real])
    assert kept == sorted(t for row in rows for t in row)


def test_text_from_a_file(tmp_path: Path) -> None:
    texts = letters(3, 40)
    path = tmp_path / "texts.txt"
    path.write_text("\n<|endoftext|>\n".join(texts) + "\n<|endoftext|>\n")
    model = tiny_llama()
    from_list = calibrate(model, Letters(), texts, progress=False)
    assert calibrate(model, Letters(), path, progress=False) == from_list
    assert calibrate(model, Letters(), str(path), progress=False) == from_list


def test_the_model_writes_its_own_text() -> None:
    model = tiny_llama(bos_token_id=1, eos_token_id=2)
    torch.manual_seed(5)
    random_before = torch.get_rng_state()
    first = calibrate(model, max_tokens=300, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert first.tokens == 300
    assert calibrate(model, max_tokens=300, seed=3, progress=False) == first
    assert calibrate(model, max_tokens=300, seed=4, progress=False) != first


def test_own_text_ends_where_the_model_ends_it() -> None:
    model = tiny_llama(bos_token_id=1, eos_token_id=2)
    for row in text_module.write_own(model, None, 300, 64, seed=0):
        assert row[0] == 1
        assert 2 not in row[:-1]
        assert row[-1] == 2 or len(row) == 64


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "empty"),
        (["", " \n"], "all of 2 texts are empty"),
        ([3], r"texts\[0\] is int"),
        (7, "texts is int"),
        ("no such file", r"pass \[text\] for a single text"),
        (["abc", "{"], "vocabulary of 26"),
        (["abc", "A"], "token id -32"),
    ],
)
def test_impossible_texts_raise(texts: Any, message: str) -> None:
    model = tiny_llama(vocab_size=26)
    with pytest.raises(ConfigurationError, match=message):
        calibrate(model, Letters(), texts, progress=False)


def test_files_that_are_not_text_raise(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b").write_text("\n \n")
    for name, message in (("a", "not UTF-8"), ("b", "empty"), ("", "directory")):
        with pytest.raises(ConfigurationError, match=message):
            calibrate(tiny_llama(), Letters(), tmp_path / name, progress=False)


def test_tokenizers_that_do_not_encode_raise() -> None:
    with pytest.raises(ConfigurationError, match="NoneType, which has no encode"):
        calibrate(tiny_llama(), None, letters(2, 30), progress=False)


def test_models_that_cannot_write_raise() -> None:
    with pytest.raises(ConfigurationError, match="cannot generate"):
        calibrate(tiny_llama().model, progress=False)
    silent = tiny_llama(bos_token_id=None, eos_token_id=None)
    silent.generation_config = copy.deepcopy(silent.generation_config)
    silent.generation_config.bos_token_id = silent.generation_config.eos_token_id = None
    with pytest.raises(ConfigurationError, match="beginning- or end-of-text"):
        calibrate(silent, progress=False)


@pytest.mark.parametrize("texts", [letters(2, 40), None])
def test_a_tokenizer_s_name_is_no_tokenizer(texts: list[str] | None) -> None:
    # A str has an encode method.
    model = tiny_llama(bos_token_id=1, eos_token_id=2)
    with pytest.raises(ConfigurationError, match=r"string 'stories_silu'.*AutoTokenizer"):
        calibrate(model, "stories_silu", texts, progress=False)


def test_a_dictionary_of_texts_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="texts is dict; expected a list of strings"):
        calibrate(tiny_llama(), Letters(), {"text": letters(2, 40)}, progress=False)
