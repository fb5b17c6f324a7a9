"""Lets an SGLang server stand still with all its requests inside, and tell how many tokens each of them has.

SGLang's own `retract` sends running requests back to the queue, from where they are computed again, but it does not tell
which tokens came before, and its cache can be emptied meanwhile in later versions only.  Inside servers that were started by
`sglang_server`, a request for weights whose name begins with `HOLD` is answered here instead.  Three more things make what
follows exact and cheap: `min_new_tokens` counts from the answer's beginning, the output layer is not computed for tokens that
have their log-probabilities already, and a prompt of several requests is computed once.  Added through SGLang's plugin hooks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

HOLD = "rl_lightning.hold"
"""Written before the question: JSON of a list of request ids."""

ANSWERS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.get_weights_by_name"
RETRACTS = "sglang.srt.managers.schedule_batch.Req.reset_for_retract"
ADMITS = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"

PLAIN = {
    "pp_size": 1,
    "dp_size": 1,
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
    """Whether a server with these settings (`/server_info`) can be held, if it has the hooks."""
    return all(info.get(name, value) == value for name, value in PLAIN.items())


def register_hold() -> None:
    """Registers the hooks; SGLang applies them when its scheduler starts."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(ANSWERS, _answer, HookType.AROUND)
    HookRegistry.register(RETRACTS, _go_on_from_here, HookType.AFTER)
    HookRegistry.register(ADMITS, _admit, HookType.AROUND)


def _answer(original: Any, updater: Any, question: Any) -> Any:
    """1 if the cache is empty now, else 0; then for each request how many tokens it has, or -1 if it is not here."""
    marker, _, rids = question.name.partition(" ")
    if marker != HOLD:
        return original(updater, question)
    from sglang.srt.managers.io_struct import GetWeightsByNameReqOutput, PauseGenerationReqInput

    updater.scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    emptied = empty_cache(updater.scheduler)
    counts = {req.rid: len(req.output_ids) for req in updater.scheduler.waiting_queue}
    return GetWeightsByNameReqOutput(parameter=[float(emptied), *(float(counts.get(rid, -1)) for rid in json.loads(rids))])


def empty_cache(scheduler: Any) -> bool:
    """Forgets all keys and values of a paused scheduler. Waiting requests hold none, but not every version knows that."""
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    try:
        return bool(scheduler.flush_cache(empty_cache=False))
    finally:
        scheduler.waiting_queue = waiting


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
