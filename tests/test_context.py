"""The parallel grid: which ranks each group holds, and how long they wait for one another."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from pool import ProcessPool

from mindspeed_lora.parallel.context import build_context

WAIT = timedelta(seconds=77)


def ranks_and_waits(tp: int, pp: int, ep: int, etp: int) -> dict[str, tuple[list[int], float]]:
    """Of each group of this rank: its ranks, and the seconds that its collectives wait."""
    context = build_context(torch.device("cpu"), tp, pp, False, ep, etp, timeout=WAIT)
    experts = context.experts
    groups = {name: getattr(context, f"{name}_group") for name in ("tp", "pp", "dp", "model", "embedding")}
    groups |= {"ep": experts.ep_group, "edp": experts.dp_group}
    found = {name: group for name, group in groups.items() if group is not None and group is not dist.group.WORLD}
    waits = {name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for name, group in found.items()}
    return {name: (dist.get_process_group_ranks(group), waits[name]) for name, group in found.items()}


def test_groups_hold_their_ranks_and_wait_as_long_as_the_job(pool: ProcessPool) -> None:
    # rank = (dp_rank * 2 + pp_rank) * 2 + tp_rank
    found = pool.run(ranks_and_waits, 8, 2, 2, 2, 1)[6]
    assert found == {
        "tp": ([6, 7], 77.0),
        "pp": ([4, 6], 77.0),
        "dp": ([2, 6], 77.0),
        "model": ([4, 5, 6, 7], 77.0),
        "embedding": ([4, 6], 77.0),
        "ep": ([6, 7], 77.0),
        "edp": ([2, 6], 77.0),
    }
