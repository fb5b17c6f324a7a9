"""Holds a local Ray cluster open for as long as its standard input is. Run as a script by `cluster.connect`, never imported.

The cluster lives in this process's session, so that a signal to the driver's process group (Ctrl-C in a terminal, `timeout`)
reaches the driver only, which can then end the run in good order.  When the driver is gone, in whatever way, the
input ends, and with it the cluster.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Reads the arguments of `ray.init` as one line of JSON, answers with the cluster's address, waits for the end of input."""
    options = json.loads(sys.stdin.readline())
    import ray

    ray.init(address="local", log_to_driver=False, **options)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown(wait_for_processes=True)


if __name__ == "__main__":
    main()
