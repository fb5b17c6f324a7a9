"""SGLang's HTTP server, as this package starts it.

    python -m rl_lightning.engines.sglang_server --model-path DIR --port N [any flag of sglang.launch_server]

Four things are added to SGLang's own launcher: the server dies with the process that started it; it can show its weights
(`sglang_probe`), which is how a weight update is proven; it can stand still with all its requests inside (`sglang_hold`); and
with `--device cpu` it runs without a GPU and without CUDA packages (`sglang_cpu`).  SGLang starts its scheduler and detokenizer
by "spawn", which runs the top level of this file again in each of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

API_KEY = "RL_LIGHTNING_SGLANG_API_KEY"
"""Environment variable with the key that clients must show: on the command line every user could read it."""


def wants_cpu(arguments: Sequence[str]) -> bool:
    """Whether the flags ask for `--device cpu`."""
    return "--device=cpu" in arguments or any(
        a == "--device" and b == "cpu" for a, b in zip(arguments, arguments[1:], strict=False)
    )


def prepare(arguments: Sequence[str]) -> None:
    """What every process of the server needs before it imports SGLang."""
    if wants_cpu(arguments):
        from rl_lightning.engines.sglang_cpu import install_stand_ins

        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads on shared cores are many times slower
        install_stand_ins()
        from rl_lightning.engines.sglang_cpu_speed import register_speed

        register_speed()
    from rl_lightning.engines.sglang_hold import register_hold
    from rl_lightning.engines.sglang_probe import register_probe

    register_probe()
    register_hold()


def fork_children() -> None:
    """Lets scheduler and detokenizer inherit what this process has imported: a third of the start-up time and memory.

    Without CUDA nothing forbids that as long as no thread runs, and SGLang starts them before any.
    """
    import multiprocessing

    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None


def main(arguments: Sequence[str]) -> None:
    """Serves until ended."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    if wants_cpu(arguments):
        fork_children()
    key = os.environ.get(API_KEY)
    try:
        run_server(prepare_server_args([*arguments, *([f"--api-key={key}"] if key else [])]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ in ("__main__", "__mp_main__"):
    if __name__ == "__main__":
        from rl_lightning.engines.process import die_with_parent

        die_with_parent()
    prepare(sys.argv[1:])
    if __name__ == "__main__":
        main(sys.argv[1:])
