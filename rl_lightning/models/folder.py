"""check_model_folder: whether a model's folder can be read, by the names and headers of its files alone."""

from __future__ import annotations

import logging
from pathlib import Path

from rl_lightning.models.hub import check_hub

logger = logging.getLogger(__name__)


def check_model_folder(option: str, path: str) -> None:
    """What is no folder is looked up on the hub, which may take a while, so it is said.

    Args:
        option: that `path` is the value of.
        path: folder or hub name.

    Raises:
        ValueError: a folder without a configuration or weights, or with weights that end early; no folder, and no way to the hub.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    if not folder.is_dir():
        logger.info("%s=%s is no folder here (%s): it is looked up on the Hugging Face hub", option, path, Path.cwd())
        check_hub(f"{option}={path}", path)
        return
    weights = sorted(folder.glob("*.safetensors"))
    lacks = [] if (folder / "config.json").is_file() else ["config.json"]
    if not weights and not any(folder.glob("pytorch_model*.bin")):
        lacks.append("model.safetensors")
    if lacks:
        raise ValueError(
            f"{option}={path} is a folder without {' and '.join(lacks)}: give one written by save_pretrained, or the name of a "
            f"model on the hub"
        )
    for file in weights:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{option}: {file} cannot be read ({error}); copy or download it again") from error
