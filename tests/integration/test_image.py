"""The container image is made of what this repository has, by the commands that everybody else installs with."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from rl_lightning.strategies.allocation import check_size, check_supported, parse_allocation
from rl_lightning.strategies.demand import Demand, sentence

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
GUIDE = (ROOT / "docs" / "cluster.md").read_text()


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of every instruction, continued lines joined."""
    lines = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def made(target: str, *variables: str) -> str:
    """The commands that `make` would run; nothing is asked of the network."""
    command = ["make", "--dry-run", "--no-print-directory", target, "TORCH_INDEX=", *variables]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def installs(engine: str, tmp_path: Path) -> list[list[str]]:
    """Arguments of every `pip install` of `make venv`."""
    lines = [line for line in made("venv", f"VENV={tmp_path / 'venv'}", f"ENGINE={engine}").splitlines() if "pip install" in line]
    return [
        [word for word in shlex.split(line.partition("pip install")[2]) if word[:6] not in ("--quie", "--disa")] for line in lines
    ]


def test_what_is_copied_exists_and_suffices_to_install() -> None:
    copied = [words.split()[:-1] for name, words in instructions() if name == "COPY"]
    before_install, whole = copied[:-1], copied[-1]
    names = [name for group in before_install for name in group]
    assert all((ROOT / name).exists() for name in names) and whole == ["."]
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    assert {"Makefile", "setup.cfg", "setup.py", "pyproject.toml", "requirements"} <= set(names)
    assert metadata["metadata"]["long_description"].removeprefix("file: ") in names
    assert metadata["metadata"]["license_files"] in names
    assert "rl_lightning/__init__.py" in names, "the version is read from it"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "models" not in ignored and "**/models" not in ignored, "rl_lightning/models is part of the package"


def test_the_image_installs_as_continuous_integration_does() -> None:
    steps = [words for name, words in instructions() if name == "RUN" and words.startswith("make ")]
    assert steps == ["make venv VENV=${VENV} ENGINE=${ENGINE}"]
    assert "make --no-print-directory venv VENV=" in (ROOT / ".ci" / "run").read_text()
    assert dict(words.split("=") for name, words in instructions() if name == "ARG" and "ENGINE" in words) == {"ENGINE": "cuda"}
    built = made("image", "ENGINE=cpu", "BUILDER=builder")
    assert "builder build -f docker/Dockerfile" in built and "--build-arg ENGINE=cpu" in built and "ubuntu" in built
    assert "--build-arg BASE" not in made("image", "ENGINE=cuda", "BUILDER=builder")


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_what_is_installed_exists(engine: str, tmp_path: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    commands = installs(engine, tmp_path)
    words = [word for command in commands for word in command]
    extras = [extra for word in words for listed in re.findall(r"^\.\[(.*)\]$", word) for extra in listed.split(",")]
    assert extras and set(extras) <= set(setup["options.extras_require"])
    assert ("sglang" in extras) == (engine == "cuda"), "on a CPU SGLang comes without its own requirements"
    files = [file for flag, file in zip(words, words[1:], strict=False) if flag == "-r"]
    assert all((ROOT / file).is_file() for file in files) and bool(files) == (engine == "cpu")


def test_the_readme_installs_the_same(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    told = [shlex.split(line.partition("pip install")[2]) for line in readme.splitlines() if line.startswith("    pip install")]
    cuda, torch, cpu, nodeps = told
    assert cuda == ["rl-lightning[sglang]"] and any("[sglang" in word for word in installs("cuda", tmp_path)[0])
    made_torch, made_cpu, made_nodeps = installs("cpu", tmp_path)
    assert torch[0] in made_torch and cpu[-2:] == made_cpu[-2:] and nodeps == made_nodeps[: len(nodeps)]


def test_the_guide_names_what_exists() -> None:
    for recipe in re.findall(r"recipes/[\w.]+yaml", GUIDE):
        assert (ROOT / recipe).is_file(), recipe
    targets = re.findall(r"make (\w+)", GUIDE)
    assert set(targets) >= {"image", "venv"} and all(made(target) for target in targets if target != "quickstart")


def test_the_guides_allocations_fit_their_nodes() -> None:
    rows = re.findall(r"^\| `([\w.+|]+)` \| (\d+) x (\d+) \|", GUIDE, re.M)
    assert len(rows) >= 4
    for mode, nodes, gpus in rows:
        allocation = parse_allocation(mode)
        check_size(allocation, int(nodes), int(gpus))
        check_supported(allocation)
    with pytest.raises(ValueError) as refused:
        check_size(parse_allocation("sglang.d4p1m1+d4p1m1"), 1, 4)
    shown = re.search(r"`(allocation_mode='.*? = 4)`", GUIDE)
    assert shown is not None and str(refused.value).startswith(shown[1])


def test_the_guide_explains_what_the_run_says() -> None:
    parts = [Demand("engine", 4, {"GPU": 1.0}, ""), Demand("trainer rank", 4, {"GPU": 1.0}, "")]
    assert f"`{sentence(parts, [{'GPU': 4.0}], ['GPU'])}`" in GUIDE
