"""Several processes as one: each has its share of an update's rows, and sums join them again.

With one process the sums, gathers and waits do nothing.
"""

import functools
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
    """This process's part of an update: the rows of all groups, one group after another, cut into
    equal shares, so that with many groups most stay whole.

    Args:
        groups: [(positions, layers)], the update's rows and the layers that they train.
        micro_batch: rows of a forward pass, at most.
    Returns:
        [(positions, layers)], one for every forward pass.
    """
    count = sum(len(positions) for positions, _ in groups)
    if count < processes():
        raise UserError(
            f"{count} rows cannot be shared out over {processes()} processes; use fewer processes, "
            "or more rows (--batch, or the method's own option)"
        )
    mine = np.array_split(np.arange(count), processes())[process()]
    parts, before = [], 0
    for positions, layers in groups:
        first, end = max(0, mine[0] - before), min(len(positions), mine[-1] + 1 - before)
        for start in range(first, end, micro_batch):
            parts.append((positions[start : min(start + micro_batch, end)], layers))
        before += len(positions)
    return parts


def in_parts(batch, sizes):
    """A batch (a dict of tensors, each with its rows first) as several of these many rows."""
    parts = zip(*(tensor.split(sizes) for tensor in batch.values()))
    return [dict(zip(batch, part)) for part in parts]


class Gradients:
    """The gradients of an update, summed over the processes. A parameter that no pass of any
    process used has None.

    With several processes they are views of one flat buffer, in the order in which a backward pass
    makes them (about: the last parameter first). It is summed in buckets, and the first ones travel
    while the backward pass of the last micro-batch still runs. With one process they are what
    `backward` makes.
    """

    def __init__(self, parameters, bucket_elements=1 << 23):
        self.parameters = list(parameters)[::-1]
        self.is_collecting = self.is_last = False
        if processes() == 1:
            return
        sizes = [parameter.numel() for parameter in self.parameters]
        self.flat = self.parameters[0].new_zeros(sum(sizes))
        views = zip(self.parameters, self.flat.split(sizes))
        self.views = [view.view_as(parameter) for parameter, view in views]
        starts = np.cumsum([0, *sizes])
        # The bucket of each parameter: 0, 1, ... without a gap behind a large one.
        _, buckets = np.unique(starts[:-1] // bucket_elements, return_inverse=True)
        self.bucket_sizes = np.bincount(buckets, sizes).astype(int).tolist()
        self.parameters_of_buckets = np.bincount(buckets)
        for index, parameter in enumerate(self.parameters):
            collect = functools.partial(self.collect, index, buckets[index])
            parameter.register_post_accumulate_grad_hook(collect)

    def start(self):
        """An update begins."""
        if processes() > 1:
            self.flat.zero_()
            for parameter, view in zip(self.parameters, self.views):
                parameter.grad = view
            self.used = [0.0] * len(self.parameters)
            self.missing, self.sums = self.parameters_of_buckets.copy(), []
            self.is_collecting = True

    def collect(self, index, bucket, parameter):
        """A pass has added to this parameter's gradient."""
        if self.is_collecting:
            self.used[index] = 1.0
            if self.is_last:
                self.missing[bucket] -= 1
                # In their order, which must be the same everywhere.
                while len(self.sums) < len(self.missing) and not self.missing[len(self.sums)]:
                    self.sum_next_bucket()

    def sum_next_bucket(self):
        bucket = self.flat.split(self.bucket_sizes)[len(self.sums)]
        self.sums.append(dist.all_reduce(bucket, async_op=True))

    def backward(self, loss, is_last):
        """Adds the gradients of a micro-batch's loss; `is_last` of the update."""
        self.is_last = is_last
        loss.backward()

    def finish(self, loss):
        """The last backward pass is over: all sums are made. `loss`, 0-dim, of this process's rows;
        returns that of all rows."""
        self.is_collecting = False
        if processes() == 1:
            return loss
        while len(self.sums) < len(self.missing):
            self.sum_next_bucket()
        # One message: the loss, and how many processes used each parameter.
        used = torch.tensor(self.used).to(loss.device, non_blocking=True)
        self.loss_and_used = torch.cat([loss[None], used])
        self.sums.append(dist.all_reduce(self.loss_and_used, async_op=True))
        for work in self.sums:
            work.wait()
        return self.loss_and_used[0]

    def tensors(self):
        """All gradients that there are."""
        return [p.grad for p in reversed(self.parameters) if p.grad is not None]

    def read(self, *numbers):
        """Waits for the device, once: 0-dim tensors as numbers. From here on an unused parameter
        has no gradient."""
        if processes() == 1:
            return torch.stack(numbers).tolist()
        found = torch.cat([torch.stack(numbers), self.loss_and_used[1:]]).tolist()
        for parameter, used in zip(self.parameters, found[len(numbers) :]):
            if not used:
                parameter.grad = None
        return found[: len(numbers)]


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
