"""Nothing damaged is restored: flipped bits, truncated, swapped and missing files, interrupted commits."""

import random
import shutil
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.checkpoint.layout_conversion import Layout
from meshwright.checkpoint.manifest import DamagedCheckpoint
from meshwright.checkpoint.storage import Storage
from meshwright.parallel.state import TrainState

PLAIN = Layout("plain", lambda path, shape: [] if shape == (1,) else [(path, ())])
PLACE = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec())


def state(seed):
    random_source = np.random.default_rng(seed)
    params = {
        "a": random_source.normal(size=(48, 64)).astype(np.float32),
        "b": random_source.normal(size=(5,)).astype(jnp.bfloat16),
    }
    whole = TrainState(
        np.int32(seed), params, {}, {"adam": {"mu": np.zeros(1, np.float32)}}, (), np.zeros(2, np.uint32)
    )
    return jax.device_put(whole, PLACE)


SHAPES = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state(0)))
SHARDINGS = jax.tree.map(lambda _: PLACE, SHAPES)


def open_storage(directory):
    return Storage(directory, layout=PLAIN)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("original") / "checkpoints"
    storage = open_storage(directory)
    for step in (1, 2):
        storage.save(state(step), step=step, data={"samples": step})
    storage.close()
    return directory


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoints")


def restored(directory, step=2):
    return open_storage(directory).restore(step, shapes=SHAPES, shardings=SHARDINGS)


def same(actual, expected):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), actual, expected)))


def files(directory):
    return sorted(file for file in (directory / "2").rglob("*") if file.is_file() and file.stat().st_size)


def test_a_restore_returns_what_was_saved(directory):
    found, data = restored(directory)
    assert same(found, state(2)) and data == {"samples": 2}


@pytest.mark.parametrize("kind", ["payload", "manifest", "any"])
def test_no_flipped_bit_is_restored(directory, kind):
    """A hundred single bits each: an error, or the very state (bits that the library never reads)."""
    chosen = [file for file in files(directory) if (kind == "manifest") == (file.name == "manifest.json")]
    if kind == "payload":
        chosen = [max(chosen, key=lambda file: file.stat().st_size)] + [file for file in chosen if "/d/" in str(file)]
    random_source, wanted, refused = random.Random(kind), state(2), 0
    for _ in range(100):
        file = random_source.choice(chosen)
        before = file.read_bytes()
        place = random_source.randrange(8 * len(before))
        damaged = bytearray(before)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            found, data = restored(directory)
            assert same(found, wanted) and data == {"samples": 2}, f"bit {place} of {file.name}"
        except DamagedCheckpoint:
            refused += 1
        file.write_bytes(before)
    assert refused == 100 if kind == "manifest" else refused > 10


def test_truncated_and_missing_files_are_refused(directory):
    """Unless the library has no need of them: then the state is the very one."""
    needless = set()
    for file in files(directory):
        before = file.read_bytes()
        for damage in (lambda f, b: f.write_bytes(b[: len(b) // 2]), lambda f, _: f.unlink()):
            damage(file, before)
            with suppress(DamagedCheckpoint):
                assert same(restored(directory)[0], state(2)), file
                needless.add(str(file.relative_to(directory / "2")))
            file.write_bytes(before)
    needed = {str(file.relative_to(directory / "2")) for file in files(directory)} - needless
    assert needed >= {"manifest.json", "state/manifest.ocdbt"} and any("/d/" in name for name in needed)


def test_another_steps_payload_under_the_right_name_is_refused(directory):
    """It is intact and of the same size, but of another step."""
    shutil.rmtree(directory / "2" / "state")
    shutil.copytree(directory / "1" / "state", directory / "2" / "state")
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint .*2: params/a block 0"):
        restored(directory)
    shutil.copy(directory / "1" / "manifest.json", directory / "2" / "manifest.json")
    with pytest.raises(DamagedCheckpoint, match=r"manifest.json .*step 1"):
        restored(directory)


def test_arrays_swapped_between_names_are_refused(tmp_path):
    """A norm or a multiset of values would not notice rows in another order."""
    one = state(1)
    swapped = jax.tree.map(lambda leaf: leaf, one)
    swapped.params["a"] = one.params["a"][::-1]
    storages = [open_storage(tmp_path / name) for name in ("right", "wrong")]
    for storage, saved in zip(storages, (one, swapped), strict=True):
        storage.save(saved, step=2, data={})
        storage.close()
    shutil.copy(tmp_path / "right" / "2" / "manifest.json", tmp_path / "wrong" / "2" / "manifest.json")
    with pytest.raises(DamagedCheckpoint, match="params/a block"):
        restored(tmp_path / "wrong")


def test_an_interrupted_commit_is_finished_and_an_unfinished_save_is_deleted(directory):
    """Killed between the arrays and the manifest: the parts are there, and the manifest is made of them."""
    storage, whole = open_storage(directory), (directory / "2" / "manifest.json").read_text()
    storage.checkpoints.commit = lambda *_, **__: None
    storage.save(state(3), step=3, data={"samples": 3})
    storage.close()
    (directory / "9.orbax-checkpoint-tmp").mkdir()
    again = open_storage(directory)
    assert again.steps == [1, 2]
    quarantined = []
    again.checkpoints.recover_interrupted(lambda step, why: quarantined.append(step))
    assert (
        again.steps == [1, 2, 3]
        and not quarantined
        and sorted(path.name for path in directory.iterdir()) == ["1", "2", "3"]
    )
    assert restored(directory, 3)[1] == {"samples": 3} and (directory / "2" / "manifest.json").read_text() == whole


def test_a_step_without_manifest_or_parts_is_quarantined_not_deleted(directory):
    (directory / "2" / "manifest.json").unlink()
    quarantined = []
    checkpoints = open_storage(directory).checkpoints
    checkpoints.recover_interrupted(lambda step, why: quarantined.append((step, why)))
    assert checkpoints.steps == [1] and checkpoints.quarantined == ["2"] and quarantined[0][0] == 2
    assert (directory / "quarantine" / "2" / "state").is_dir()


def test_a_save_without_the_part_of_every_process_is_deleted(directory):
    """Killed after the arrays, before a process had hashed its part: deleted, not quarantined."""
    checkpoints = open_storage(directory).checkpoints
    (directory / "2" / "manifest.json").unlink()
    checkpoints.begin(2, processes=2)
    quarantined = []
    checkpoints.recover_interrupted(lambda step, why: quarantined.append(step))
    assert checkpoints.step_directories == [1] and not checkpoints.quarantined and not quarantined
