"""`nf4 plan`: memory of each GPU, bytes between GPUs and a modelled step time, by arithmetic.

Nothing here imports PyTorch: what is computed are sums of sizes.
"""
