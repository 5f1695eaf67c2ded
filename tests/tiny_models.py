"""Hugging Face models with random weights, small enough to run in milliseconds: one of each family."""

import torch

VOCABULARY, HIDDEN, HEAD = 64, 32, 16

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    # Larger than usual, so that the small layers matter.
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GATED = COMMON | {
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
}
DENSE = {"intermediate_size": 32}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
INDEXER = {
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 64,
    "indexer_compress_ratio": 16,
}
PER_CHANNEL = (
    COMMON
    | DENSE
    | {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "kv_lora_rank": HEAD,
        "qk_nope_head_dim": HEAD,
        "v_head_dim": HEAD,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
    }
)
KIMI = {"linear_head_dim": HEAD, "linear_num_heads": 2}
GLM = {
    "qk_rope_head_dim": 0,
    "n_routed_experts": 2,
    "q_lora_rank": HEAD,
    "index_topk": 64,
    "index_head_dim": HEAD,
    "index_n_heads": 2,
    "hc_mult": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": HIDDEN,
    "projection_intermediate_size": 16,
    "patch_size": 4,
    "image_size": 16,
}

#: Family -> (model type of its text part, what the configuration takes).
CONFIGS = {
    "qwen3_next": ("qwen3_next", GATED | DENSE | EXPERTS | {"head_dim": HEAD}),
    "qwen3_5": ("qwen3_5_text", GATED | DENSE | {"head_dim": HEAD}),
    "qwen3_5_moe": ("qwen3_5_moe_text", GATED | EXPERTS | {"head_dim": HEAD}),
    "qwen4_exp": ("qwen4_exp_text", GATED | EXPERTS | INDEXER | {"head_dim": HEAD}),
    "olmo_hybrid": ("olmo_hybrid", GATED | DENSE | {"linear_num_value_heads": 2}),
    "kimi_linear": ("kimi_linear", PER_CHANNEL | KIMI | {"qk_rope_head_dim": HEAD, "num_local_experts": 2}),
    "bailing_hybrid": (
        "bailing_hybrid",
        PER_CHANNEL | {"qk_rope_head_dim": HEAD, "num_local_experts": 2, "head_dim": HEAD},
    ),
    "glm5_next": ("glm5_next", {"text_config": PER_CHANNEL | KIMI | GLM, "vision_config": VISION}),
}


def build(family, dtype=torch.float32, **changes):
    """Return a model of the family; changes are of its configuration (of text)."""
    import transformers

    kind, arguments = CONFIGS[family]
    whole = "vision_config" in arguments
    if whole:
        arguments = arguments | {"text_config": arguments["text_config"] | changes}
    else:
        arguments = arguments | changes
    config = transformers.AutoConfig.for_model(kind, **arguments)
    loader = transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return loader.from_config(config, dtype=dtype).eval()


def of_both(family):
    """Changes that give a model of the family one layer of each kind."""
    experts = {"mlp_layer_types": ["dense", "sparse"]} if family == "glm5_next" else {}
    return of_layers("linear_attention", "full_attention") | experts


def of_layers(*kinds):
    """Changes that give a model these layers: "linear_attention" or "full_attention" each."""
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds)}
