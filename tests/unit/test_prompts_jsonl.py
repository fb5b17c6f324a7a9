from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from rl_lightning.prompts.dataset import PromptDataset
from rl_lightning.prompts.jsonl import JsonlPrompts
from rl_lightning.testing import FakeTokenizer

MATH: dict[str, Any] = {"query_id": "m1", "prompt": "1+1=", "task": "math", "solutions": ["\\boxed{2}"]}
CODE = {"query_id": "c1", "prompt": "add", "task": "code", "input_output": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})}
CHAT = {"query_id": "s1", "messages": [{"role": "user", "content": "why?"}], "task": "stem", "solutions": ["A"], "level": 3}


def write(folder: Path, *lines: dict[str, Any] | str | bytes) -> Path:
    path = folder / "data.jsonl"
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in encoded))
    return path


def load(path: Path, **settings: Any) -> JsonlPrompts:
    prompts = JsonlPrompts(path, **settings)
    prompts.setup(FakeTokenizer())  # type: ignore[arg-type]
    return prompts


def without(line: dict[str, Any], field: str) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k != field}


def test_reads_math_code_and_chat(tmp_path: Path) -> None:
    prompts = load(write(tmp_path, MATH, "", CODE, CHAT))
    assert isinstance(prompts, PromptDataset) and len(prompts) == 3
    math, code, chat = prompts
    assert (math.query_id, math.text, math.task, math.reference) == ("m1", "1+1=", "math", {"solutions": ["\\boxed{2}"]})
    assert math.token_ids == tuple(ord(c) for c in "1+1=")
    assert code.reference["input_output"] == {"inputs": ["1 2"], "outputs": ["3"]}
    assert chat.text == "<user>why?\n<assistant>" and chat.reference == {"solutions": ["A"], "level": 3}
    assert pickle.loads(pickle.dumps(prompts))[2] == chat


def test_task_is_math_unless_named_and_number_ids_become_text(tmp_path: Path) -> None:
    line = {**without(MATH, "task"), "query_id": 7, "messages": None}
    prompt = load(write(tmp_path, line))[0]
    assert (prompt.task, prompt.query_id) == ("math", "7")


BAD_LINES = [
    ("{", "not valid JSON"),
    (json.dumps(MATH)[:-1] + ', "level": ' + "7" * 5000 + "}", "thousands of digits"),
    ({**MATH, "prompt": "a\ud800b"}, "half of a surrogate pair"),
    ({**CODE, "input_output": '{"inputs": ["\\ud800"], "outputs": ["1"]}'}, "'input_output' is not usable JSON (half"),
    ("[1]", "a list where a JSON object was expected"),
    (b'{"query_id": "\xff"}', "not UTF-8"),
    (without(MATH, "query_id"), "missing field 'query_id'"),
    (without(MATH, "prompt"), "missing field 'prompt' (final text) or 'messages' (chat)"),
    ({**MATH, "prompt": 5}, "field 'prompt' must be a non-empty string, not 5"),
    ({**MATH, "messages": CHAT["messages"]}, "keep one"),
    ({**CHAT, "messages": [{"role": "user"}]}, "every message needs"),
    ({**MATH, "task": "maths"}, "unknown task 'maths', known are math, code, stem"),
    (without(MATH, "solutions"), "missing field 'solutions', which task math needs; give it, or a task"),
    ({**MATH, "solutions": "2"}, "must be a non-empty list of non-empty strings"),
    (without(CODE, "input_output"), "missing field 'input_output', which task code needs"),
    ({**CODE, "input_output": "{"}, "'input_output' is not valid JSON"),
    ({**CODE, "input_output": {"inputs": ["1"], "outputs": []}}, "equally long"),
    ({**CODE, "input_output": {"inputs": ["1"], "outputs": ["1"], "fn_name": 3}}, "'fn_name'"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:20] for _, reason in BAD_LINES])
def test_a_bad_line_is_named_or_dropped_and_counted(
    tmp_path: Path, line: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, MATH, line, CODE)
    with pytest.raises(ValueError) as error:
        load(path)
    assert f"{path}:2: " in str(error.value) and reason in str(error.value) and "allow_bad_lines" in str(error.value)

    prompts = load(path, allow_bad_lines=True)
    assert len(prompts) == 2 and prompts.counts["bad_lines"] == 1
    assert f"{path}:2: " in caplog.text and "dropped 1 bad line(s) of 3" in caplog.text


def test_characters_beyond_the_first_plane_are_read(tmp_path: Path) -> None:
    assert load(write(tmp_path, {**MATH, "prompt": "\U0001f600"}))[0].text == "\U0001f600"


def test_many_bad_lines_make_one_short_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"20 bad line\(s\)(.|\n)*and 15 more"):
        load(write(tmp_path, *["{"] * 20))


def test_missing_empty_and_useless_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing.jsonl does not exist"):
        load(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="holds no line"):
        load(write(tmp_path, "\n\n"))
    with pytest.raises(ValueError, match="holds no good line"):
        load(write(tmp_path, "{"), allow_bad_lines=True)


def test_long_prompts_are_dropped_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, MATH, {**MATH, "query_id": "m2", "prompt": "x" * 11}, {**MATH, "query_id": "m3", "prompt": "y" * 10})
    prompts = load(path, max_prompt_len=10)
    assert [p.query_id for p in prompts] == ["m1", "m3"] and prompts.counts["too_long"] == 1
    assert "dropped 1 of 3 prompts over max_prompt_len=10" in caplog.text
    with pytest.raises(ValueError, match="all 3 prompts .* max_prompt_len=2"):
        load(path, max_prompt_len=2)


def test_duplicate_ids_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prompts = load(write(tmp_path, MATH, MATH, CODE))
    assert len(prompts) == 3 and prompts.counts["duplicate_query_ids"] == 1 and "'m1'" in caplog.text


def test_own_tasks_need_no_reference(tmp_path: Path) -> None:
    line = {"query_id": "r1", "prompt": "rhyme", "task": "poetry", "style": "haiku"}
    prompt = load(write(tmp_path, line), extra_tasks=["poetry"])[0]
    assert prompt.task == "poetry" and prompt.reference == {"style": "haiku"}


def test_messages_without_a_template_name_the_line(tmp_path: Path) -> None:
    class Plain(FakeTokenizer):
        chat_template = None

    prompts = JsonlPrompts(write(tmp_path, CHAT))
    with pytest.raises(ValueError, match=r"data.jsonl:1: .*no chat template.*`prompt`"):
        prompts.setup(Plain())  # type: ignore[arg-type]
