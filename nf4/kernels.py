"""Make the top-level folder kernels/ importable as ``nf4.kernels``.

The folder has no ``__init__.py``: a package of that name on ``sys.path`` would be taken for Hugging
Face's ``kernels`` and break ``import transformers``. An installed nf4 has the folder beside this
file; a checkout has it one level up. Importing this module imports no kernel and no Triton.
"""

from nf4.tools.paths import beside_package

__path__ = [str(beside_package("kernels"))]
