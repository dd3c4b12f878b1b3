"""A full disk and full shared memory are recognised, whatever they were wrapped in."""

import errno

import pytest

from elfatt.data.resources import exhausted


def full_disk():
    return OSError(errno.ENOSPC, "No space left on device", "/runs/last.pth.tar")


def wrapped():
    """torch.save's own error hides the system's."""
    try:
        try:
            raise full_disk()
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 704 vs 598")  # noqa: B904
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [full_disk(), wrapped(), OSError(errno.EDQUOT, "Disk quota exceeded")])
def test_a_full_disk_is_named_with_its_free_space(error, tmp_path):
    text = exhausted(error, tmp_path)
    assert text.startswith(f"the disk is full ({tmp_path} has ") and text.endswith(
        " MiB left): make room, then continue with --resume auto"
    )


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to allocate shared memory(shm) for file </torch_7_1>: No space left on device (28)",
        "unable to write to file </torch_7_1>: No space left on device (28)",
    ],
)
def test_full_shared_memory_is_named(text):
    outer = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    outer.__cause__ = RuntimeError(text)
    for error in (RuntimeError(text), outer):
        assert "workers ran out of shared memory" in exhausted(error) and "or --workers 0" in exhausted(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "no", "x")])
def test_other_errors_are_left_alone(error):
    assert exhausted(error) is None
