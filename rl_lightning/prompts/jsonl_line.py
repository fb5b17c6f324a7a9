"""One line of a JSONL prompt file: from bytes to checked fields, or to a reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_lightning.prompts.json_lines import BadLine, decode_json, decode_object, shortened, text_field

TASKS = ("math", "code", "stem")


def parse_line(line: bytes, extra_tasks: Sequence[str] = ()) -> dict[str, Any]:
    """The line's fields: `query_id`, `task`, one of `prompt` and `messages`, and the reference (`input_output` decoded).

    Raises:
        BadLine: no JSON object, or a field is missing or of the wrong kind.
    """
    fields = decode_object(line)
    fields["query_id"] = _query_id(fields)
    task = fields["task"] = fields.get("task") or "math"
    if task not in (*TASKS, *extra_tasks):
        known = ", ".join((*TASKS, *extra_tasks))
        raise BadLine(f"unknown task {task!r}, known are {known}; correct it, or name it in extra_tasks")
    _check_question(fields)
    if task in ("math", "stem"):
        _check_solutions(fields)
    elif task == "code":
        fields["input_output"] = _input_output(fields)
    return fields


def _query_id(fields: dict[str, Any]) -> str:
    value = fields.get("query_id")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_field(fields, "query_id")


def _check_question(fields: dict[str, Any]) -> None:
    if fields.get("prompt") is None:
        fields.pop("prompt", None)
    if fields.get("messages") is None:
        fields.pop("messages", None)
    if "prompt" in fields and "messages" in fields:
        raise BadLine("both 'prompt' and 'messages' are given; keep one")
    if "messages" not in fields:
        if "prompt" not in fields:
            raise BadLine("missing field 'prompt' (final text) or 'messages' (chat)")
        text_field(fields, "prompt")
        return
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadLine(f"field 'messages' must be a non-empty list, not {shortened(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadLine(f"every message needs the strings 'role' and 'content', not {shortened(message)}")


def _check_solutions(fields: dict[str, Any]) -> None:
    if fields.get("solutions") is None:
        raise BadLine(
            f"missing field 'solutions', which task {fields['task']} needs; give it, or a task of your own that extra_tasks names"
        )
    solutions = fields["solutions"]
    if not isinstance(solutions, list) or not solutions or not all(isinstance(s, str) and s.strip() for s in solutions):
        raise BadLine(f"field 'solutions' must be a non-empty list of non-empty strings, not {shortened(solutions)}")


def _input_output(fields: dict[str, Any]) -> dict[str, Any]:
    cases = fields.get("input_output")
    if cases is None:
        raise BadLine("missing field 'input_output', which task code needs")
    if isinstance(cases, str):
        try:
            cases = decode_json(cases)
        except BadLine as error:
            raise BadLine(f"field 'input_output' is {error}") from error
    if not isinstance(cases, dict):
        raise BadLine(f"field 'input_output' must be an object, not {shortened(cases)}")
    inputs, outputs = cases.get("inputs"), cases.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise BadLine("field 'input_output' needs the equally long, non-empty lists 'inputs' and 'outputs'")
    if not isinstance(cases.get("fn_name"), str | None):
        raise BadLine(f"'fn_name' in 'input_output' must be a string, not {shortened(cases['fn_name'])}")
    return cases
