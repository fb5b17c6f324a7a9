"""Lets an SGLang server stand still with all its requests inside, and tell how many tokens each of them has.

SGLang's own `retract` sends running requests back to the queue, from where they are computed again, and its `in_place` leaves
them as they are, but neither tells which tokens came before; and the cache can be emptied meanwhile in later versions only.
Inside servers that were started by `sglang_server`, a request for weights whose name begins with `HOLD` is answered here
instead.  Three more things make what follows exact and cheap: `min_new_tokens` counts from the answer's beginning, the output
layer is not computed for tokens that have their log-probabilities already, and a prompt of several requests is computed once.
Added through SGLang's plugin hooks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

HOLD = "rl_lightning.hold"
"""Written before the question: JSON with `rids`, a list of request ids, and `cache`, null or the name of the next cache."""

ANSWERS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.get_weights_by_name"
RETRACTS = "sglang.srt.managers.schedule_batch.Req.reset_for_retract"
ADMITS = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"

PLAIN = {
    "pp_size": 1,
    "tokenizer_worker_num": 1,
    "disaggregation_mode": "null",
    "speculative_algorithm": None,
    "max_queued_requests": None,
}
"""Settings of a server that can be held: all requests are in one queue, which refuses none of them."""

MIN_SHARED = 8
"""Prompts with fewer tokens to compute are not worth waiting for."""

LEAST, LEADERS, WAITED = "_rl_lightning_least", "_rl_lightning_leaders", "_rl_lightning_waited"
"""Attributes that are added to SGLang's objects."""


def can_hold(info: Mapping[str, Any]) -> bool:
    """Whether a server with these settings (`/server_info`, or arguments) can be held, if it has the hooks."""
    given = {name.replace("-", "_"): value for name, value in info.items() if value is not None}
    return all(given.get(name, value) == value for name, value in PLAIN.items())


def register_hold() -> None:
    """Registers the hooks; SGLang applies them when its scheduler starts."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(ANSWERS, _answer, HookType.AROUND)
    HookRegistry.register(RETRACTS, _go_on_from_here, HookType.AFTER)
    HookRegistry.register(ADMITS, _admit, HookType.AROUND)


def _answer(original: Any, updater: Any, question: Any) -> Any:
    """1 if no request will meet old keys that are not its own, else 0; then how many tokens each has, -1 if it is not here."""
    marker, _, asked = question.name.partition(" ")
    if marker != HOLD:
        return original(updater, question)
    from sglang.srt.managers.io_struct import GetWeightsByNameReqOutput, PauseGenerationReqInput

    scheduler, asked = updater.scheduler, json.loads(asked)
    cache = asked["cache"]
    scheduler.pause_generation(PauseGenerationReqInput(mode="retract" if cache is None else "in_place"))
    parted = empty_cache(scheduler) if cache is None else leave_cache(scheduler, cache)
    counts = count_tokens(scheduler)
    return GetWeightsByNameReqOutput(parameter=[float(parted), *(float(counts.get(rid, -1)) for rid in asked["rids"])])


def empty_cache(scheduler: Any) -> bool:
    """Forgets all keys and values of a paused scheduler. Waiting requests hold none, but not every version knows that."""
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    try:
        return bool(scheduler.flush_cache(empty_cache=False))
    finally:
        scheduler.waiting_queue = waiting


def leave_cache(scheduler: Any, name: str) -> bool:
    """Requests that run keep their keys and values; those that wait will neither find nor leave any but in cache `name`."""
    import torch

    torch.get_device_module().synchronize()  # a batch may still be computed, with weights that are about to be replaced
    for req in scheduler.waiting_queue:
        req.extra_key = name
    return True


def count_tokens(scheduler: Any) -> dict[str, int]:
    """Tokens of every request of a paused scheduler by its id, those included that are sampled but not yet handed out."""
    held = [*scheduler.waiting_queue, *([scheduler.chunked_req] if scheduler.chunked_req else [])]
    for batch in (scheduler.running_batch, scheduler.last_batch):
        held += batch.reqs if batch else []
    counts = {req.rid: len(req.output_ids) for req in held}
    for batch, _ in getattr(scheduler, "result_queue", ()):  # of the overlapping loop alone
        sampling = [r for r in batch.reqs if not (r.finished() or r.is_retracted or r.inflight_middle_chunks > 0)]
        counts |= {req.rid: len(req.output_ids) + 1 for req in sampling}
    return counts


def _go_on_from_here(result: None, req: Any) -> None:
    """What a retracted request has is like a prompt: nothing of it is scored, and it counts for `min_new_tokens`."""
    if vars(req).get(LEAST) is None:
        setattr(req, LEAST, req.sampling_params.min_new_tokens)
    req.sampling_params.min_new_tokens = max(0, getattr(req, LEAST) - len(req.output_ids))
    if req.return_logprob and req.logprob_start_len >= len(req.origin_input_ids):
        req.logprob_start_len = len(req.origin_input_ids) + len(req.output_ids)
    vars(req).pop(WAITED, None)


def _admit(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """A request whose prompt is being computed for another one of this batch waits for the next batch, once."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    prompt = (req.origin_input_ids.tobytes(), getattr(req, "extra_key", None))
    leaders = vars(adder).setdefault(LEADERS, set())
    missing = len(req.origin_input_ids) - len(req.prefix_indices)
    worth_it = missing > max(MIN_SHARED, adder.page_size) and not getattr(adder.tree_cache, "disable", True)
    if worth_it and prompt in leaders and not hasattr(req, WAITED):
        setattr(req, WAITED, True)
        return AddReqResult.CONTINUE
    before = len(adder.can_run_list)
    result = original(adder, req, *args, **kwargs)
    if len(adder.can_run_list) > before:
        leaders.add(prompt)
    return result
