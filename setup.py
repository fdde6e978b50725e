"""Map kernels/ to the package nf4.kernels and bench/ to nf4.bench; the rest: pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "nf4",
        "nf4.reference",
        "nf4.compare",
        "nf4.cpu",
        "nf4.gpu",
        "nf4.kinds",
        "nf4.demo",
        "nf4.report",
        "nf4.integrations",
        "nf4.integrations.peft",
        "nf4.integrations.transformers",
        "nf4.kernels",
        "nf4.bench",
    ],
    package_dir={"nf4": "nf4", "nf4.kernels": "kernels", "nf4.bench": "bench"},
)
