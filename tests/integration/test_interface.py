"""gloo between ranks uses the address by which Ray's nodes know each other."""

from __future__ import annotations

from datetime import timedelta

import psutil
import ray

from rl_lightning.strategies.job import worker_environment
from rl_lightning.weights.channel import own_address, serve_store
from rl_lightning.weights.interface import name_interface

TIMEOUT_S = 120.0


class Member:
    """One of two that sum a number up."""

    def serve(self) -> int:
        self.store = serve_store(own_address(), TIMEOUT_S, 2)
        return int(self.store.port)

    def connections(self, rank: int, port: int) -> set[str]:
        """Own addresses of this process's connections to the other one."""
        import torch
        from torch import distributed

        name_interface(own_address())
        limit = timedelta(seconds=TIMEOUT_S)
        store = self.store if rank == 0 else distributed.TCPStore(own_address(), port, 2, is_master=False, timeout=limit)
        before = set(psutil.Process().net_connections("tcp"))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
        distributed.all_reduce(torch.ones(1))
        opened = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c not in before and c.status == "ESTABLISHED"}
        distributed.barrier()
        return opened


def test_whatever_the_name_of_the_machine_stands_for(ray_cluster: str) -> None:
    actor = ray.remote(Member).options(num_cpus=0, runtime_env={"env_vars": worker_environment()})
    members = [actor.remote() for _ in range(2)]
    port = ray.get(members[0].serve.remote(), timeout=TIMEOUT_S)
    opened = ray.get([member.connections.remote(rank, port) for rank, member in enumerate(members)], timeout=TIMEOUT_S)
    assert opened == [{own_address()}] * 2
