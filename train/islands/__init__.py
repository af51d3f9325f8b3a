"""A run whose replicas are jobs of their own: started together, joined, met, and caught up with each other.

    archipelago -> a job an island: joining -> meetings (parcels: what is sent; waiting: for how long)

What one island computes is `train/island.py`; who counts is decided in `train/launch/quorum.py`, without JAX.
"""
