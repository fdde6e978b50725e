"""What every kernel must return, in plain PyTorch: one file an operator, the specification.

These run on any device; on a CPU they are what `nf4` computes with. They check nothing: arguments
are checked in `nf4.functional`.
"""
