"""What a process other than the first compiled on a CPU is there again at its next start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.configs.errors import UserError
from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine import compile_cache


@pytest.fixture
def second(tmp_path, monkeypatch):
    """The second process of two, as far as it can tell, with a cache of its own."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "other-processes"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(platform="cpu", data=2))


class Program:
    """A lowered program, which counts how often it is compiled."""

    def __init__(self, factor, mesh):
        where = NamedSharding(mesh, PartitionSpec())
        self._lowered = jax.jit(lambda x: {"y": x * factor}, in_shardings=where).lower(jnp.ones(3))
        self.in_tree, self.out_tree = self._lowered.in_tree, self._lowered.out_tree
        self.as_text, self.compiles = self._lowered.as_text, 0

    def compile(self, compiler_options):
        self.compiles += 1
        return self._lowered.compile(compiler_options=compiler_options)


def answers(program, mesh, factor, options=None):
    found = compile_cache.compile_cached(program, mesh, options=options or {})(np.arange(3, dtype=np.float32))
    return found["y"].tolist() == [0, factor, 2 * factor]


def test_a_program_is_compiled_once(second, mesh):
    assert answers(first := Program(3, mesh), mesh, 3) and first.compiles == 1
    assert answers(again := Program(3, mesh), mesh, 3) and again.compiles == 0


def test_each_program_mesh_and_process_has_its_own_entry(second, mesh, monkeypatch):
    assert answers(Program(3, mesh), mesh, 3) and answers(Program(4, mesh), mesh, 4)
    wider = make_mesh(MeshConfig(platform="cpu", data=4))
    assert answers(Program(3, wider), wider, 3)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert answers(Program(3, mesh), mesh, 3)
    assert answers(Program(3, mesh), mesh, 3, {"xla_cpu_enable_fast_math": True})
    assert len([one for one in second.iterdir() if one.is_dir()]) == 5


def test_an_option_that_the_compiler_refuses_is_named(second, mesh):
    for number, wrong in enumerate(({"xla_no_such_option": 1}, {"xla_cpu_enable_fast_math": "perhaps"})):
        with pytest.raises(UserError, match=f"mesh.compiler_options: {next(iter(wrong))}"):
            answers(Program(number, mesh), mesh, number, wrong)


def test_a_damaged_entry_is_compiled_again(second, mesh):
    assert answers(Program(3, mesh), mesh, 3)
    (file,) = second.glob("*/executable")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert answers(again := Program(3, mesh), mesh, 3) and again.compiles == 1


def test_a_cache_that_cannot_be_written_costs_only_time(second, mesh):
    second.write_text("where the entries would be")
    assert answers(one := Program(3, mesh), mesh, 3) and one.compiles == 1


def test_process_0_uses_only_the_cache_of_jax(second, mesh, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert answers(Program(3, mesh), mesh, 3) and not second.exists()
