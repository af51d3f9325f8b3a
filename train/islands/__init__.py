"""A run whose replicas are jobs of their own: started together, joined, met, and caught up with each other.

    join -> sync (compiled_rounds: what is sent; agreed_wait: for how long)

What one island computes is `train/engine/island_replica.py`; `train/islands/quorum.py` decides who counts, without JAX.
"""
