"""Names that several rooms must spell alike: mesh axes, logical axes, tensors a memory policy may name."""

# Slow links first: replicas may sit on other continents, tensor-parallel devices share a switch.
MESH_AXES = ("replica", "pipe", "data", "fsdp", "expert", "seq", "tensor")

# Dimensions of weights: `models/logical_axes.py` names those of each weight, `parallel/sharding.py` maps names to axes.
LOGICAL_AXES = ("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "expert", "layers")

# Intermediate values a block passes through `checkpoint_name`, in the order it computes them.
POLICY_TENSORS = (
    "block_in", "attn_norm", "q", "k", "v", "attn_out", "attn_lse", "attn_proj",
    "mlp_norm", "mlp_gate", "mlp_up", "mlp_act", "mlp_out",
)  # fmt: skip

# What every batch holds: global arrays of shape [global_batch, sequence].
BATCH_FIELDS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
# What some recipes read besides: what a row says of its example, log p of each target by the model before step 0, and
# the words that a teacher finds likeliest, [global_batch, sequence, recipe.top_k].
RECIPE_FIELDS = ("labels", "reference_logprobs", "teacher_logprobs", "teacher_tokens")
ADAPTER_IDS_FIELD = "adapters"  # and with several adapters: the number of each row's own, all along the row
TEACHER_TOP_K_FIELDS = RECIPE_FIELDS[2:]
