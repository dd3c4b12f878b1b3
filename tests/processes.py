"""Two forked processes as torchrun would start them."""

import os

from torch.distributed import TCPStore


def open_store() -> TCPStore:
    """Store on a free port, served by this process: rank 0 may find a port taken that was free a moment ago."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def join_as(rank: int, store: TCPStore) -> None:
    """Set the environment that torchrun gives to one of two processes."""
    env = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": store.host,
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    os.environ.update({key: str(value) for key, value in env.items()})
