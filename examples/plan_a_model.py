"""What would the pass do to Llama-3.1-8B on 8 data-parallel ranks?

    python examples/plan_a_model.py

Needs no ranks and no weights.
"""

from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fgtp_pass
from fgtp_pass.plan.plan import format_bytes

RANKS = 8


def main() -> None:
    config = LlamaConfig(  # the shape of Llama-3.1-8B
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.zeros(4, 1, dtype=torch.long)  # a decode step: what serving spends time in
    plan = fgtp_pass.make_plan(
        model,
        kwargs={"input_ids": ids, "use_cache": False},
        data_parallel_size=RANKS,
        ranks_per_host=RANKS,
    )
    print(plan)
    print()

    total = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = plan.bytes_saved_per_rank
    print(
        f"weights per rank: {format_bytes(total)} before, {format_bytes(total - saved)} after, "
        f"{format_bytes(saved)} freed ({saved / total:.0%})"
    )
    sent = sum(site.bytes_per_token for site in plan.sites)
    print(
        f"per decode step: {plan.collectives_per_step} collectives, "
        f"{format_bytes(sent)} sent per rank and own token"
    )

    print("\nleft alone:")
    for reason, count in Counter(left.reason for left in plan.left_alone).most_common():
        print(f"{count:5}  {reason}")

    # A plan is data: it travels as JSON, and equal plans have equal fingerprints.
    assert fgtp_pass.Plan.from_json(plan.to_json()).fingerprint == plan.fingerprint


if __name__ == "__main__":
    main()
