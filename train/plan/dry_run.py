"""Checks of `validate --deep` that need parameter shapes, data or a traced step; nothing is allocated."""

from functools import partial

import jax

from ...checkpoint.interop import huggingface
from ...configs.run import RunConfig
from ...parallel.mesh import make_mesh
from ..core.process_env import ProcessInfo
from ..data import assemble
from ..engine import runtime
from ..engine.program import Program, build
from ..objectives.distillation import check_teacher, init_weights


def build_program(config: RunConfig) -> Program:
    """Start the runtime and build the program of `config` on its mesh."""
    runtime.start(config, ProcessInfo())
    return build(config, make_mesh(config.mesh))


def check(config: RunConfig) -> None:
    """Open the data, trace the step and compute all shardings. Raises UserError on the first mistake."""
    data = assemble.load_run_data(config)
    check_teacher(config, data.tokenizer)
    program = build_program(config)
    for model in (config.model, config.recipe.teacher or config.model):
        if model.origin is not None:
            huggingface.check_files(model.origin, model, shapes=jax.eval_shape(partial(init_weights, config, model)))
    with jax.set_mesh(program.mesh):
        jax.eval_shape(program.step, program.shapes, program.batch_shapes)
    jax.tree.leaves(program.shardings)
