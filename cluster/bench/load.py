"""Many small jobs of many clients, and the memory and descriptors of the cluster's processes afterwards."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from cluster.client.client import Client
from cluster.engine.runtime import ClusterRuntime

_SIZES = (20, 21, 63, 64, 65, 300, 1009, 3000)  # prompt tokens


def measure_load(client: Client, runtime: ClusterRuntime, clients: int, jobs: int, rounds: int) -> dict[str, Any]:
    """Run rounds of jobs from another process; resident bytes and open files of head and stages after each."""
    processes = {"head": psutil.Process()}
    processes |= {f"stage {n}": psutil.Process(pid) for n, pid in enumerate(runtime.launched.pids)}
    states = [_footprint(processes)]
    seconds = []
    for number in range(rounds):
        began = time.perf_counter()
        command = [sys.executable, "-m", "cluster.bench.load", client.address, str(clients), str(jobs), str(number)]
        subprocess.run(command, check=True)
        seconds.append(round(time.perf_counter() - began, 2))
        assert not runtime.kv_usage, "pages of ended jobs are not free again"
        states.append(_footprint(processes))
    return {"clients": clients, "jobs_a_round": jobs, "round_s": seconds, "after_round": states}


def _footprint(processes: dict[str, psutil.Process]) -> dict[str, dict[str, float]]:
    gc.collect()
    time.sleep(1.0)  # for connections that are about to close
    return {
        name: {"rss_mib": round(process.memory_info().rss / 2**20, 1), "files": process.num_fds()}
        for name, process in processes.items()
    }


def _one_client(address: str, number: int, jobs: int, seed: int) -> None:
    draw = random.Random(f"{seed} {number}")
    with Client(address) as client:
        for at in range(jobs):
            ids = [draw.randrange(5, 4000) for _ in range(draw.choice(_SIZES))]
            job = client.submit(token_ids=ids, max_tokens=draw.randint(1, 24), ignore_eos=True)
            if at % 5 == 2:
                job.cancel()
            elif at % 2:
                for _ in job.stream():
                    pass
            else:
                job.wait()


def main() -> None:
    """Run the clients' process, with the arguments ADDRESS CLIENTS JOBS SEED."""
    address, clients, jobs, seed = sys.argv[1], *map(int, sys.argv[2:5])
    with ThreadPoolExecutor(clients) as threads:
        futures = [threads.submit(_one_client, address, n, jobs // clients, seed) for n in range(clients)]
        for future in futures:
            future.result()


if __name__ == "__main__":
    main()
