"""From collections of documents to batches of packed rows, in an order that depends on nothing but the seed.

    documents -> tokens (cached) -> windows -> rows -> mixture -> batches

`assemble.build` goes the whole way; each stage is one module and knows only the stage before it. JAX is never imported.
"""
