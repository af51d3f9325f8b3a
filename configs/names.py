"""Names that several rooms share: mesh axes, logical axes, tensors of memory policies, fields of batches."""

# Slow links first: replicas may be on other continents, tensor-parallel devices share a switch.
MESH_AXES = ("replica", "pipe", "data", "fsdp", "expert", "seq", "tensor")

# Dimensions of weights. `models/logical_axes.py` names those of each weight; `parallel/sharding.py` maps them to the
# mesh.
LOGICAL_AXES = ("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "expert", "layers")

# Tensors that a block passes through `checkpoint_name`, in the order in which it computes them.
POLICY_TENSORS = (
    "block_in", "attn_norm", "q", "k", "v", "attn_out", "attn_lse", "attn_proj",
    "mlp_norm", "mlp_gate", "mlp_up", "mlp_act", "mlp_out",
)  # fmt: skip

# Fields of every batch: global arrays [global_batch, sequence].
BATCH_FIELDS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
# Further fields of some recipes: the label of an example, the log-probability of each target under the model before
# step 0, and the teacher's most likely tokens, [global_batch, sequence, recipe.top_k].
RECIPE_FIELDS = ("labels", "reference_logprobs", "teacher_logprobs", "teacher_tokens")
ADAPTER_IDS_FIELD = "adapters"  # with several adapters: the number of the row's adapter, at each token
TEACHER_TOP_K_FIELDS = RECIPE_FIELDS[2:]
