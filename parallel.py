"""Several processes as one: each has its share of an update's rows, and sums join them again.

With one process everything here is the identity.
"""

import sys

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from errors import UserError


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def process():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    return process() == 0


def print0(*text):
    """Prints on the main process, without breaking its progress bar."""
    if is_main():
        tqdm.write(" ".join(map(str, text)), file=sys.stdout)
        sys.stdout.flush()


def micro_batches(groups, micro_batch):
    """This process's part of an update.

    Args:
        groups: [(positions, layers)], the update's rows and the layers that they train.
        micro_batch: rows of a forward pass, at most.
    Returns:
        [(positions, layers)]: each group is shared out over the processes, and a share is split.
    """
    parts = []
    for positions, layers in groups:
        if 0 < len(positions) < processes():  # one without rows would have no gradients to add
            group = f"a group of {len(positions)} rows"
            raise UserError(
                f"{group} cannot be shared out over {processes()} processes; use fewer of them, "
                "or more rows (--batch, or the method's own option)"
            )
        mine = np.array_split(positions, processes())[process()]
        for start in range(0, len(mine), micro_batch):
            parts.append((mine[start : start + micro_batch], layers))
    return parts


def sum_over_processes(tensors, bucket_elements=1 << 25):
    """Adds tensors up over all processes, in place, flattened into few large messages."""
    if processes() == 1:
        return
    bucket, size = [], 0
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        size += tensor.numel()
        if size >= bucket_elements or index == len(tensors) - 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(total.view_as(tensor))
            bucket, size = [], 0


def gather(values, device):
    """A list of numbers of this process -> the lists of all processes, in order of rank."""
    if processes() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(processes())]
    dist.all_gather(everyone, mine)
    return [row.tolist() for row in everyone]


def max_over_processes(values, device):
    """The largest of each number over all processes, in a list."""
    return [max(column) for column in zip(*gather(values, device))]


def wait_for_all():
    """Returns when every process has come here."""
    if dist.is_initialized():
        dist.barrier()
