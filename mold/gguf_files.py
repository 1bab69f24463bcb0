"""Models in .gguf files, kept as transformers saves them: reading such a file takes half a minute, every time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from mold.files import digest

logger = logging.get_logger(__name__)

MOST_BYTES = 2**30
"""Of a file whose model is kept: up to eight times as much, in float32."""


def kept_folder(path: Path) -> Path | None:
    """The folder of a small file's model and tokenizer, below ``HF_HOME/mold``; written if it is not there.

    Args:
        path: of the .gguf file. Another content, by size and time, or version of transformers has another folder.

    Returns:
        None where the file has more than `MOST_BYTES`, or there is no place for it.

    Raises:
        ValueError: it cannot be read.
    """
    stat = path.stat()
    if stat.st_size > MOST_BYTES:
        return None
    known = digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns, transformers.__version__)
    folder = Path(constants.HF_HOME) / "mold" / f"{path.stem}-{known[:10]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            whole = Path(made) / "model"
            for part in _read(path):
                part.save_pretrained(whole)
            whole.rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # which another process may have written by now
            logger.warning(f"{path}: is read anew every time: its model cannot be kept in {folder.parent} ({error})")
            return None
    return folder


def _read(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    plain = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **plain)
        return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # of bytes that are no such file the reader raises anything
        raise ValueError(f"model: cannot load {str(path)!r}: {type(error).__name__}: {error}") from error
