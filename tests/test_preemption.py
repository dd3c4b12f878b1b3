"""Signals of a machine that is taken away are noted, shared between processes and survived by workers."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from elfatt.preemption import SIGNALS, Preemption
from elfatt.processes import start_worker
from tests.processes import join_as, open_store

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_and_the_old_handler_restored(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested and not preemption.agreed(CPU)
        for _ in range(2):  # torchrun and Slurm may both send it
            os.kill(os.getpid(), number)
        assert preemption.requested and preemption.agreed(CPU)
    assert signal.getsignal(number) is before


def test_a_signal_to_one_process_is_known_to_all_at_the_same_step():
    store, children = open_store(), []
    for rank in range(2):
        child = os.fork()
        if not child:
            join_as(rank, store)
            dist.init_process_group("gloo")
            with Preemption() as preemption:
                answers = []
                for step in range(3):
                    if rank == 1 and step == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    answers.append(preemption.agreed(CPU))
            os._exit(0 if answers == [False, True, True] and preemption.requested == (rank == 1) else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


class Pids(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return os.getpid()


def test_workers_outlive_the_signals():
    loader = DataLoader(
        Pids(), batch_size=1, num_workers=1, prefetch_factor=1, worker_init_fn=partial(start_worker, None)
    )
    batches = iter(loader)
    worker = next(batches).item()
    for number in SIGNALS:
        subprocess.run(["kill", f"-{number.value}", str(worker)], check=True)  # from another process than its parent
    assert [batch.item() for batch in batches] == [worker] * 3


ENDLESS = """
from functools import partial
from torch.utils.data import DataLoader
from elfatt.processes import start_worker

class Run:
    pass

run = Run()
run.itself = run  # freed after multiprocessing ends its processes
loader = DataLoader(range(9), num_workers=1, persistent_workers=True, worker_init_fn=partial(start_worker, None))
run.batches = iter(loader)
next(run.batches)
"""


def test_a_program_does_not_wait_for_its_workers():
    subprocess.run([sys.executable, "-c", ENDLESS], check=True, timeout=60)
