"""What a test types after a command, for a real run that is as small as runs get."""

SMALL = (
    "logging.every=1", "model.layers=1", "model.embed=32", "model.heads=2", "model.kv_heads=2", "model.mlp=32",
    "model.vocab=384", "data.source=synthetic", "data.tokenizer={bytes: true, train: null, vocab: null}",
    "data.held_out=0", "data.sequence_length=32", "data.global_batch=8", "evaluation.prompts=[]",
    "logging.tensorboard=false", "optimizer.warmup_steps=0",
)  # fmt: skip
