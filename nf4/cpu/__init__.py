"""What a CPU computes with where numba is installed: the reference's results, bit for bit, faster.

One file an operator, with the signature of nf4/reference/. Without numba the reference itself runs.
"""
