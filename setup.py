"""Map the top-level folder kernels/ to the package nf4.kernels; all else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "nf4",
        "nf4.reference",
        "nf4.cpu",
        "nf4.gpu",
        "nf4.demo",
        "nf4.integrations",
        "nf4.kernels",
    ],
    package_dir={"nf4": "nf4", "nf4.kernels": "kernels"},
)
