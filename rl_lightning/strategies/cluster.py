"""The Ray cluster of a run: joins the one that is there, or starts one on this machine."""

from __future__ import annotations

import atexit
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rl_lightning.failure import NoClusterError

logger = logging.getLogger(__name__)

LOCAL, AUTO = "local", "auto"
PROBE_TIMEOUT_S = 5.0
START_TIMEOUT_S = 120.0
START_POLL_S = 0.25
STOP_TIMEOUT_S = 5.0
OF_A_NEW_CLUSTER = frozenset(
    {
        "num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "include_dashboard", "dashboard_host",
        "dashboard_port", "enable_resource_isolation", "cgroup_path", "system_reserved_cpu", "system_reserved_memory",
        "_memory", "_temp_dir", "_system_config", "_plasma_directory", "_object_spilling_directory", "_node_name",
        "_enable_object_reconstruction", "_redis_password", "_redis_username",
    }
)  # fmt: skip
"""Arguments of `ray.init` that size or shape a cluster. One that runs already has its own, and Ray refuses them."""

OWN_CLUSTER_ENVIRONMENT = {
    "RAY_process_group_cleanup_enabled": "true",  # processes that an actor starts end with it, also when it is killed
    "RAY_worker_niceness": "0",  # actors do the work here: with Ray's 15 any other process starves them
}

_owned = False
_head: subprocess.Popen[str] | None = None


def connect(options: Mapping[str, Any] | None = None, check: Callable[[], None] | None = None) -> None:
    """Makes this process a driver of a Ray cluster. Does nothing where it is one already, or runs inside an actor.

    Args:
        options: arguments of `ray.init`.  `address` (or, without it, the environment variable RAY_ADDRESS) is `local` to
            start a cluster on this machine, `auto` to join the one that runs on it, `host:port` to join that one; without
            any of these a running cluster is joined and else one is started.
        check: called again and again while a cluster starts; may raise to give up.

    Raises:
        ValueError: an address that this function does not know.
        ConnectionError: there is no cluster at the address, or it does not let this process in; says what to do.
    """
    import ray

    if ray.is_initialized():
        return
    options = dict(options or {})
    address = options.pop("address", None) or os.environ.get("RAY_ADDRESS") or None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {"logging_level": "ERROR", **options}
    if address is None:
        address = AUTO if _running_address(options.get("_temp_dir")) else LOCAL
    global _owned
    if address == LOCAL:
        address = _start({name: value for name, value in options.items() if name in OF_A_NEW_CLUSTER}, check)
    elif dropped := sorted(OF_A_NEW_CLUSTER & options.keys()):
        logger.info("%s: left out, the running cluster has its own (Ray address %s)", ", ".join(dropped), address)
    _join(address, {name: value for name, value in options.items() if name not in OF_A_NEW_CLUSTER})
    _owned = True
    logger.info("using Ray cluster %s", describe())


def disconnect() -> None:
    """Leaves the cluster that `connect` made; one that it started ends, with every process of it."""
    global _owned, _head
    if not _owned:
        return
    import ray

    ray.shutdown()
    head, _owned, _head = _head, False, None
    if head is None:
        return
    assert head.stdin is not None
    head.stdin.close()
    try:
        head.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        logger.warning("the Ray cluster did not end within %g s; killing it", STOP_TIMEOUT_S)
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(STOP_TIMEOUT_S)


def started_here() -> bool:
    """Whether `connect` started the cluster: it is this machine alone and no other will join it."""
    return _head is not None


def describe() -> str:
    """Address and resources of the connected cluster, for logs."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    return (
        f"{ray.get_runtime_context().gcs_address}: {len(nodes)} node{'s' * (len(nodes) != 1)}, {total.get('CPU', 0):g} CPUs, "
        f"{total.get('GPU', 0):g} GPUs, {total.get('memory', 0) / 2**30:.0f} GiB memory"
    )


def beside_me() -> dict[str, Any]:
    """Options of an actor that is on this process's node, or elsewhere once that is gone: a run depends on no further node.

    Ray puts an actor that asks for nothing anywhere, whatever its strategy says; hence a little memory.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return {"num_cpus": 0, "memory": 2**20, "scheduling_strategy": here}


def _start(options: Mapping[str, Any], check: Callable[[], None] | None) -> str:
    """Starts a cluster in a session of its own, see head.py; gives its address."""
    global _head
    environment = {**OWN_CLUSTER_ENVIRONMENT, **os.environ}
    command = [sys.executable, "-P", str(Path(__file__).with_name("head.py"))]
    head = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        address = _ask(head, {"include_dashboard": False, "logging_level": "ERROR", **options}, check)
    except BaseException:
        head.kill()
        raise
    if not address:
        raise ConnectionError(
            f"Ray did not start on this machine; its own message is above, its logs are in "
            f"{options.get('_temp_dir', '/tmp/ray')}/session_latest/logs"
        )
    _head = head
    atexit.register(disconnect)
    return address


def _ask(head: subprocess.Popen[str], options: Mapping[str, Any], check: Callable[[], None] | None) -> str:
    """Address of the cluster that `head` starts, empty if it failed."""
    assert head.stdin is not None and head.stdout is not None
    head.stdin.write(json.dumps(options) + "\n")
    head.stdin.flush()
    deadline = time.monotonic() + START_TIMEOUT_S
    while not select.select([head.stdout], [], [], START_POLL_S)[0]:
        if check is not None:
            check()
        if time.monotonic() > deadline:
            raise ConnectionError(f"Ray did not start on this machine within {START_TIMEOUT_S:g} s")
    return head.stdout.readline().strip()


def _join(address: str, options: Mapping[str, Any]) -> None:
    import ray

    if address != AUTO:
        _probe(address)
    _offer_token()
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise NoClusterError(_refusal(address)) from error


def _running_address(temp_dir: str | None) -> str | None:
    """Address that the last `ray start` of this machine wrote down, if something answers there."""
    try:
        address = (Path(temp_dir or "/tmp/ray") / "ray_current_cluster").read_text().strip()
        _probe(address)
    except (OSError, ValueError):
        return None
    return address


def _probe(address: str) -> None:
    """Finds a wrong address in seconds; Ray itself tries for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "//" in host:
        raise ValueError(f"Ray address {address!r} is none of local, auto or host:port; Ray Client (ray://) cannot be used here")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise NoClusterError(
            f"no Ray cluster answers at {address} ({error}); start one there with `ray start --head --port={port}`, or leave the "
            f"address out to start one on this machine"
        ) from error


def _offer_token() -> None:
    """Sends this machine's token, if it has one, unless RAY_AUTH_MODE says otherwise.

    With an explicit address Ray does not do so by itself, and is then refused by every cluster that asks for one.  A cluster
    that was started with RAY_AUTH_MODE=disabled takes the token but cannot call this process back, and ends its actors as
    if nobody wanted them: the driver then needs that variable too.
    """
    try:
        setup = importlib.import_module("ray._private.authentication.authentication_token_setup")
    except ImportError:  # a Ray without token authentication
        return
    logging.getLogger(setup.__name__).setLevel(logging.ERROR)  # that tokens are in use is no warning
    setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _refusal(address: str) -> str:
    if address == AUTO:
        return "no Ray cluster runs on this machine; start one with `ray start --head`, or use address: local"
    return (
        f"the Ray cluster at {address} did not let this process join. Most often its authentication token is another one: copy "
        f"~/.ray/auth_token of its head node to this machine or set RAY_AUTH_TOKEN to it (RAY_AUTH_MODE=disabled on all nodes "
        f"turns tokens off). Other causes: another version of Ray or Python there, or a port that is not the head's"
    )
