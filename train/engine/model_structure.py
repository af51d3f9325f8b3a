"""The model of a configuration: its NNX structure, with adapters and quantized kernels, and its initial parameters.

    graph = model_graphdef(config)
    params, frozen = partition_params(config)

`params` are trained; `frozen` is all else that the forward pass reads.
"""

from typing import Any

import jax

from ...configs.adapter_runs import resolve_adapters
from ...configs.run import RunConfig
from ...models.adapters import multi_lora
from ...models.adapters.attach import adapter_inserter, init_adapters, split_trained
from ...models.decoder import Decoder, decoder_graphdef
from ...models.quantized_model import make_fake_quantize, quantize_frozen, quantized_kernel_inserter
from ...models.reward_head import RewardHead, init_reward_head
from ...parallel.prng import init_key
from ..objectives import distillation
from ..objectives.registry import RECIPES


def model_graphdef(config: RunConfig) -> Any:
    """The model's nnx graphdef, with adapters next to its kernels, and quantized kernels in place of frozen ones."""
    if config.adapters:
        insert_adapters = multi_lora.adapter_inserter(config.model, resolve_adapters(config))
    else:
        insert_adapters = adapter_inserter(config.model, config.adapter)
    _, frozen = jax.eval_shape(lambda: partition_params(config))
    insert_kernels = quantized_kernel_inserter(config.model, config.quantization, distillation.without_teacher(frozen))

    def change(decoder: Decoder) -> None:
        insert_adapters(decoder)
        insert_kernels(decoder)
        if RECIPES[config.recipe.name].uses_scores:
            decoder.score = RewardHead(config.model.embed)

    return decoder_graphdef(config.model, change)


def partition_params(config: RunConfig, weights: Any = None, teacher: Any = None) -> tuple[Any, Any]:
    """Return (trained, frozen) parameters of the model that starts from `weights` (None: from the seed).

    Adapters are added and frozen kernels quantized. `teacher` are the weights of a teacher of another model; None gives
    it random ones, for shapes only.
    """
    if weights is None:
        weights = distillation.init_weights(config)
    key = jax.random.fold_in(init_key(config), 2)
    if config.adapters:
        adapted = multi_lora.init_adapters(weights, config.model, resolve_adapters(config), key)
        params, frozen = multi_lora.split_trained(adapted, config.model, resolve_adapters(config))
    else:
        adapted = weights
        if config.adapter is not None:
            fake_quantize = make_fake_quantize(config.quantization)
            adapted = init_adapters(weights, config.model, config.adapter, key, fake_quantize=fake_quantize)
        params, frozen = split_trained(adapted, config.model, config.adapter)
    if RECIPES[config.recipe.name].uses_scores:
        params = params | {"score": init_reward_head(config.model.embed, jax.random.fold_in(init_key(config), 3))}
    frozen = quantize_frozen(frozen, config.model, config.quantization)
    return params, distillation.with_teacher(frozen, config, initial_weights=weights, teacher_weights=teacher)
