"""The model's tokenizer: loaded once, and the two ways from a question to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lightning.models.hub import check_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=8)
def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder (or of the hub name) `model_path`; loaded once in a process.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    if not Path(model_path).is_dir():
        check_hub(f"model path {model_path!r}", model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without its files
            raise ValueError("it would know no token")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from model path {model_path!r} ({first_line(error)}); "
            "give a folder written by save_pretrained that holds tokenizer.json, or the name of a model on the hub"
        ) from None  # the sentence that is shown is that of the innermost ValueError
    return tokenizer


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of final texts.

    The beginning-of-sequence token is put in front where the tokenizer does so by itself and the text lacks it.
    """
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or tokenizer.encode("")[:1] != [bos]:
        return encoded
    return [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], template_options: Mapping[str, Any] | None = None
) -> str:
    """The final text of a conversation, ready for the model's turn.

    Args:
        tokenizer: carries the chat template.
        messages: `{"role": ..., "content": ...}` in order.
        template_options: variables for the template, such as `enable_thinking`.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template; give the final text as `prompt` instead of `messages`")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **(template_options or {})
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {first_line(error)}") from error
    return str(text)


def first_line(error: Exception) -> str:
    """What `error` says, without its novel."""
    return str(error).strip().split("\n")[0] or type(error).__name__
