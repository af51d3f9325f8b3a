"""The cost of a snapshot in memory at every step, parity and fingerprints included, for `bench checkpoint`.

One process plays the trainers of two hosts: each has half of the state, a directory and a snapshot agent, and their
parity group has XOR parity. A step is matrix products, as many as take the given seconds, and an update of the state,
which it donates. Blocks of steps with and without snapshots take turns.

Large products keep all cores busy, as a step on a CPU does; there CPU time of a snapshot delays a step. Small products
keep one core busy and leave the others idle, as a step on an accelerator does.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil

from .harness import median_ratio

BLOCK = 4  # steps between changes
HOSTS = 2
SIDES = {"all cores busy": 1024, "one core busy": 32}  # rows of the matrix
LEAF = 16  # megabytes of an array


def random_state(megabytes: int, *, seed: int = 0) -> Any:
    """A state of random arrays on the first device."""
    import jax
    import numpy as np

    from meshwright.parallel.state import TrainState

    draw = np.random.default_rng(seed)
    params = {f"a{n}": draw.random((1024, 4096), np.float32) for n in range(max(megabytes // LEAF, 1))}
    return jax.device_put(TrainState(np.int32(0), params, {}, (), (), np.zeros(2, np.uint32)), jax.devices()[0])


def measure_slowdown(megabytes: int, side: int, *, seconds: float, turns: int) -> dict[str, Any]:
    """The cost of snapshots of a state of `megabytes` for steps of `seconds`, which multiply matrices of `side` rows.

    Numbers are medians over steps with and without snapshots; the slowdown is the median ratio of neighbouring blocks.
    """
    import jax

    from meshwright.checkpoint.async_copy import donation_safe_copy
    from meshwright.checkpoint.memory_store import MemoryStore
    from meshwright.checkpoint.redundancy.agent_files import memory_directory
    from meshwright.checkpoint.redundancy.parity_plan import make_parity_plan
    from meshwright.configs.sections.training import CheckpointConfig
    from meshwright.train.core.event_log import EventLog
    from meshwright.train.core.rendezvous import Server
    from meshwright.train.launch.snapshot_agent_process import LocalSnapshotAgents
    from meshwright.train.launch.snapshot_agents import SnapshotAgents
    from meshwright.train.snapshot_writer import SnapshotWriter

    config = CheckpointConfig(memory_every=1, parity="xor")
    plan = make_parity_plan(config, hosts=HOSTS, processes=HOSTS)
    step, repeats = make_step(seconds, side)
    states = [random_state(megabytes // HOSTS, seed=host) for host in range(HOSTS)]
    blocks: dict[bool, list[float]] = {False: [], True: []}  # with snapshots? -> median seconds of every block
    cpu = dict.fromkeys((False, True), 0.0)  # seconds of all cores
    stalls: list[float] = []
    with ExitStack() as stack:
        run = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        server = stack.enter_context(Server())
        launcher = LocalSnapshotAgents(run, rendezvous=server.address)
        stack.enter_context(SnapshotAgents(plan, run=run, store=server.store, launcher=launcher)).recover()
        memories = [MemoryStore(memory_directory(run, host=host), launch_slot=host) for host in range(HOSTS)]
        event_log = EventLog(run, enabled=False)
        writers = [stack.enter_context(closing(SnapshotWriter(config, memory, event_log))) for memory in memories]
        for writer, state in zip(writers, states, strict=True):
            writer.reserve(state)
        number = 0
        agents = [psutil.Process(launcher.pid(host)) for host in range(HOSTS)]
        agent_seconds = lambda: sum(sum(agent.cpu_times()[:2]) for agent in agents)
        for turn in range(2 * (turns + 1)):
            before = time.process_time()
            block = []
            for _ in range(BLOCK):
                began = time.monotonic()
                if turn % 2:
                    number += 1
                    for host, writer in enumerate(writers):
                        start = time.monotonic()
                        writer.accepts(number)
                        copy = donation_safe_copy(states[host])
                        writer.start_snapshot(copy, number, data={}, stall=time.monotonic() - start)
                        del copy
                    stalls.append(time.monotonic() - began)
                states = jax.block_until_ready(step(states, repeats))
                block.append(time.monotonic() - began)
            for writer in writers:
                writer.accepts(number)  # waits until the last snapshot is protected
            if turn > 1:  # the first turns allocate memory and compile
                blocks[bool(turn % 2)].append(statistics.median(block))
                cpu[bool(turn % 2)] += time.process_time() - before
            else:
                warmup_seconds = agent_seconds()
        cpu_of_agents = agent_seconds() - warmup_seconds
        for writer in writers:
            writer.close()
        protected = memories[0].protected
        for memory in memories:
            memory.clear()
    return {
        "megabytes": megabytes,
        "step": round(statistics.median(blocks[False]), 4),
        "step with a snapshot": round(statistics.median(blocks[True]), 4),
        "slowdown": round(median_ratio(blocks[True], blocks[False]) - 1, 4),
        "stall": round(statistics.median(stalls[BLOCK:]), 4),
        "cpu seconds of a snapshot": {
            "trainer": round((cpu[True] - cpu[False]) / (turns * BLOCK), 4),
            "keepers": round(cpu_of_agents / (turns * BLOCK), 4),
        },
        "protected after": round(protected.seconds, 4),
        "protected of": [protected.step, number],
    }


def make_step(seconds: float, side: int) -> tuple[Any, Any]:
    """Return step(state, repeats), which donates its state, and the products of `side` x `side` that take `seconds`."""
    import jax
    import jax.numpy as jnp

    factor = jnp.ones((side, side), jnp.float32) / side
    tries = 50 * (1024 // side) ** 2

    @jax.jit
    def work(repeats: Any) -> Any:
        return jax.lax.fori_loop(0, repeats, lambda _, x: x @ factor, factor)

    def update_states(states: Any, product: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf + product[0, 0].astype(leaf.dtype), states)

    update = jax.jit(update_states, donate_argnums=0)
    work(10).block_until_ready()
    began = time.monotonic()
    work(tries).block_until_ready()
    return lambda states, repeats: update(states, work(repeats)), int(tries * seconds / (time.monotonic() - began))
