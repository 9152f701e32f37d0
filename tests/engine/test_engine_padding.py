"""Every step runs at one token count on all data-parallel ranks, in both of vLLM's model runners.

The V2 runner needs a GPU; here the function in which its ranks agree is the real one, on two ranks.
"""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from ranks import Pools


def _agreed(tokens: list[int]) -> tuple[list[int], int, list[int]]:
    """Per rank: the V1 counts, and the V2 batch and counts, for `tokens[rank]` of its own."""
    from vllm.v1.worker import dp_utils as v1
    from vllm.v1.worker.gpu import dp_utils as v2

    from fgtp_pass.vllm.lockstep import join_host_messages

    join_host_messages()
    rank, world = dist.get_rank(), dist.get_world_size()
    here: Any = SimpleNamespace(
        cpu_group=dist.group.WORLD, device_group=dist.group.WORLD, device="cpu"
    )
    parallel: Any = SimpleNamespace(
        data_parallel_size=world,
        data_parallel_rank=rank,
        disable_nccl_for_dp_synchronization=True,
        num_ubatches=1,
    )
    with (
        mock.patch.object(v1, "get_dp_group", return_value=here),
        mock.patch.object(v2, "get_dp_group", return_value=here),
    ):
        _, first, _ = v1.coordinate_batch_across_dp(tokens[rank], False, parallel)
        no_graph = v2.BatchExecutionDescriptor(
            cg_mode=v2.CUDAGraphMode.NONE, num_tokens=tokens[rank], num_reqs=1
        )
        batch, second = v2.sync_cudagraph_and_dp_padding(
            None, no_graph, tokens[rank], 1, None, world, rank
        )
    assert first is not None
    return (
        first.tolist(),
        batch.num_tokens,
        [] if second is None else second.num_tokens_across_dp.tolist(),
    )


@pytest.mark.parametrize("tokens", [[3, 7], [1, 1], [9, 0]])
def test_both_runners_pad_to_the_largest(ranks: Pools, tokens: list[int]) -> None:
    largest = [max(tokens)] * 2
    for counts, batch, counts_v2 in ranks(2).run(_agreed, tokens):
        assert counts == largest
        assert batch == largest[0]
        assert counts_v2 == largest


def test_a_step_in_which_no_rank_has_tokens_stays_empty(ranks: Pools) -> None:
    for counts, batch, counts_v2 in ranks(2).run(_agreed, [0, 0]):
        assert (counts, batch, counts_v2) == ([0, 0], 0, [])
