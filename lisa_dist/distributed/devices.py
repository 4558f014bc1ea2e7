"""The device of this rank."""

import os

from deepspeed.accelerator import get_accelerator


def use_own_device() -> None:
    """Make the GPU of this rank the current one, on which new tensors and collectives are.

    `deepspeed.init_distributed` leaves each rank at the first GPU. DeepSpeed's engine takes the rank's own only when it
    is built, which is after LISA's first collective.
    """
    if "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
