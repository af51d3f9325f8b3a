"""From collections of documents to batches of packed rows, in an order that depends on the seed alone.

    documents -> tokens (cached) -> windows -> rows -> mixture -> batches

`assemble.build_data` runs all stages; each stage is one module that knows only the stage before it. JAX is never
imported.
"""
