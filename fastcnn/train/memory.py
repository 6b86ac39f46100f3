"""The memory that a training step needs, counted the same way for every network and on every machine."""

import itertools
import os
import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

METHOD = "the most memory that tensors take during a training step, beyond parameters and optimizer state"


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Return by how many bytes the memory of tensors grows at its highest while ``work()`` runs, None where unknown.

    What was held before (parameters, data, another network) is not counted. On the CPU the profiler's record of
    allocations is added up: unlike resident memory it does not depend on what the C library keeps for reuse. Profiling
    is slow, so nothing should be timed here.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains on stderr where there is no GPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch remark on profiling in cycles, which this is not
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    memory = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in memory), initial=0))  # bytes are negative where freed
