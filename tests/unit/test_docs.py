"""The Python in the documentation runs."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
BLOCKS = [(page.name, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]


def test_there_is_code_in_the_documentation():
    assert {page for page, _ in BLOCKS} >= {"your_own_reward.md", "your_own_loss.md"}


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_code_runs(page, code):
    names = {}
    exec(compile(code, page, "exec"), names)
    if "short_and_right" in names:
        from rl_lightning.types import Prompt

        prompt = Prompt("1", "3+4=", (1,), reference={"answer": "7"})
        assert names["short_and_right"](prompt, " 7") > 0 > names["short_and_right"](prompt, "8")


@pytest.mark.parametrize("page", [*PAGES, Path(__file__).parents[2] / "README.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
