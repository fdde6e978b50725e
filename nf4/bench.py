"""Make the top-level folder bench/ importable as ``nf4.bench``, as nf4/kernels.py does kernels/.

An installed nf4 has the folder beside this file; a checkout has it one level up. Importing this
module imports no benchmark.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_installed = _here / "bench"
__path__ = [str(_installed if _installed.is_dir() else _here.parent / "bench")]
