"""Map kernels/ to the package nf4.kernels and bench/ to nf4.bench; the rest: pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "nf4",
        "nf4.reference",
        "nf4.cpu",
        "nf4.gpu",
        "nf4.ops",
        "nf4.layers",
        "nf4.adapters",
        "nf4.models",
        "nf4.models.kinds",
        "nf4.files",
        "nf4.error",
        "nf4.error.report",
        "nf4.integrations",
        "nf4.integrations.peft",
        "nf4.integrations.transformers",
        "nf4.commands",
        "nf4.commands.demo",
        "nf4.commands.comparison",
        "nf4.commands.planning",
        "nf4.tools",
        "nf4.kernels",
        "nf4.bench",
        "nf4.bench.harness",
        "nf4.bench.model",
        "nf4.bench.gpu_day",
    ],
    package_dir={"nf4": "nf4", "nf4.kernels": "kernels", "nf4.bench": "bench"},
)
