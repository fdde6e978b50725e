"""Make the top-level folder bench/ importable as ``nf4.bench``, as nf4/kernels.py does kernels/.

Importing this module imports no benchmark.
"""

from nf4.tools.paths import beside_package

__path__ = [str(beside_package("bench"))]
