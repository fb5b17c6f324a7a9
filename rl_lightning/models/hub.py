"""check_hub: whether a model that is no folder can be had from the Hugging Face hub, before a loader waits for it."""

from __future__ import annotations

import time
from pathlib import Path

PATIENCE_S = 2.0
"""For how long a connection that fails is tried again; transformers has each of its many requests do so for half a minute."""

FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")
"""Any of these in the cache tells that the model was downloaded."""


def check_hub(what: str, name: str) -> None:
    """Passes what is in the cache, and else only asks for an answer: whether the hub has the model is told by its loader.

    Waits `HF_HUB_ETAG_TIMEOUT` (10 s if it is not set) for a connection; a hub that is slow to answer passes.

    Args:
        what: the option and its value, for the message.
        name: the model's name on the hub.

    Raises:
        ValueError: it cannot be a name on the hub, or there is no way to the hub.
    """
    import httpx
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    place = f"{what} is no folder here ({Path.cwd()})"
    try:
        if any(try_to_load_from_cache(name, file) for file in FILES):
            return
        _ask(f"{constants.ENDPOINT}/api/models/{name}", constants.HF_HUB_ETAG_TIMEOUT)
    except HFValidationError:
        raise ValueError(f"{place}, and the hub has no such names: give a folder written by save_pretrained") from None
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else error
        raise ValueError(
            f"{place} nor in the Hugging Face cache ({constants.HF_HUB_CACHE}), and the hub cannot be reached ({reason}): give a "
            f"folder written by save_pretrained, or set HF_HOME to a cache that holds the model, and HF_HUB_OFFLINE=1"
        ) from None
    except httpx.TransportError:
        pass  # a way there is, if a bad one: whoever loads has the patience for it


def _ask(url: str, timeout_s: float) -> None:
    import httpx
    from huggingface_hub import get_session

    give_up_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            get_session().head(url, timeout=timeout_s)
        except httpx.ConnectError:
            if time.monotonic() > give_up_s:
                raise
        else:
            return
        time.sleep(1.0)
