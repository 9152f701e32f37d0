"""A component of your own: shard the q_b_proj of DeepSeek's latent attention (MLA).

    python examples/custom_pattern.py

MLA makes its queries in two matmuls: q_a_proj takes the hidden state down to a latent, q_b_proj
takes the normed latent up to all heads. Built in, both belong to qkv, which is opt-in; the pattern
below finds q_b_proj alone, by data flow. The pass does the rest: path, collectives, shards, plan.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
import two_ranks
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import fgtp_pass
from fgtp_pass import Pattern, fgtp_backend
from fgtp_pass.pattern import Cut, Findings, GraphView, Match, Reach, Refusal, single_matmul

COMPONENT = "q_b"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """The one reader of a latent that serves nothing else, on its way to an attention core.

    In   x -> linear(A) -> norm -> linear(B) -> heads, rotation ... -> core
    Out  A and the norm as before; B: Own -ag-> All x W[out/k] -> Cut -a2a-> Own, or, where the
         latent is wide, Own -a2a-> Cut x W[in/k] -> Sum -rs-> Own
    """
    for matmul in view.matmuls:
        if matmul.weight is None or matmul.node in found.claimed:
            continue
        origin = view.facts[matmul.input].origin
        latent = view.matmul_at(origin) if origin is not None else None
        if latent is None or Reach.ATTENTION not in view.reach[matmul.node]:
            continue
        # The latent of keys and values also goes into attention as it is (the rotated part).
        if view.reach[latent.node] != Reach.MATMUL:
            continue
        # A projection of the embeddings, as OPT has, is read by q, k and v.
        readers = [m for m in view.matmuls if view.facts[m.input].origin is latent.node]
        if len(readers) == 1:
            yield single_matmul(COMPONENT, matmul, cuts=(Cut.IN, Cut.OUT))


PATTERN = Pattern(COMPONENT, "qb_tensor_parallel_size", find)

SIZES = {
    "qb_tensor_parallel_size": 2,
    "oproj_tensor_parallel_size": 2,
    "mlp_tensor_parallel_size": 2,
}


def build() -> nn.Module:
    """A toy DeepSeek-V3: one dense layer, one layer with experts."""
    config = DeepseekV3Config(
        hidden_size=64,
        intermediate_size=144,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        vocab_size=160,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)  # every rank has the same weights
    return DeepseekV3ForCausalLM(config).eval()


@torch.no_grad()
def rank_main() -> float:
    """Compare the sharded model with the unsharded one on this rank's own prompts."""
    model = build()
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 160, (2, 7), generator=generator)
    want = model(input_ids=ids, use_cache=False).logits
    fast = torch.compile(
        model,
        backend=fgtp_backend,
        options={
            "finegrained_tp_config": SIZES,
            "patterns": [PATTERN],
            "inner_backend": "eager",  # a toy model is not worth a compile
        },
    )
    got = fast(input_ids=ids, use_cache=False).logits
    if dist.get_rank() == 0:
        print(fgtp_pass.applied_plan(fast))
    return float((got - want).abs().max() / want.abs().max())


def main() -> None:
    # What would be sharded can be seen without ranks and without weights' memory.
    plan = fgtp_pass.make_plan(
        build(),
        kwargs={"input_ids": torch.zeros(1, 4, dtype=torch.long), "use_cache": False},
        finegrained_tp_config=SIZES,
        data_parallel_size=2,
        patterns=[PATTERN],
    )
    print("found:", [w.fqn for s in plan.sites if s.component == COMPONENT for w in s.weights])

    errors = two_ranks.run(rank_main, timeout=600)
    print("largest relative error by rank:", ", ".join(f"{error:.1e}" for error in errors))
    if max(errors) > 1e-5:
        raise SystemExit("the sharded model differs from the unsharded one.")
    print("same logits as unsharded")


if __name__ == "__main__":
    main()
