"""Shipped recipes with settings from papers."""

from meshwright.configs.loader import load_config


def test_a_third_of_the_layers_reads_all_of_a_long_document():
    """LongGen, arXiv:2410.01485: full attention in a third of the layers, the rest sees a window of the old length."""
    config = load_config("finetune/long-context")
    windows, rope = config.model.windows, config.model.rope
    assert windows.count(None) * 3 == len(windows) and set(windows) - {None} == {rope.original_length}
    assert rope.factor * rope.original_length == config.data.sequence_length
