"""What each rank of tests/test_two_hosts.py runs under torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import assert_same_weights, call, empty, logits, options

import fgtp_pass
from fgtp_pass.collectives.groups import hostname


def main(shared: str, disk: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert hostname().endswith(str(rank))
    names: list[str] = [""] * 2
    dist.all_gather_object(names, hostname())
    assert names[0] != names[1]

    # a path that both hosts see
    given = {"kwargs": call(empty("llama").config), "options": options(tokens="ragged")}
    model = fgtp_pass.load_checkpoint(empty("llama"), shared, **given)
    want = fgtp_pass.full_state_dict(model)

    # weights on the disk of host 0 alone
    own = Path(disk) / "checkpoint"
    assert own.exists() is (rank == 0)
    sent = fgtp_pass.load_checkpoint(empty("llama"), own, source="rank0", **given)
    assert_same_weights(sent, want)

    # shards on the disk of each host, and on the one that both see
    for folder in (Path(disk) / "shards", Path(shared) / "shards"):
        fgtp_pass.save_checkpoint(sent, folder)
        again = fgtp_pass.load_checkpoint(empty("llama"), folder, **given)
        assert_same_weights(again, want)
        assert torch.equal(logits(again), logits(model))

    # new weights from rank 0
    new = {name: tensor + 1 for name, tensor in want.items()}
    fgtp_pass.update_weights(again, None if rank else new, source="rank0")
    assert_same_weights(again, new)
    print(f"rank {rank} on {hostname()}: all as it should be")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
