"""How to install what is missing: nf4 is on no index, so its extras come from a checkout."""

_OWN = __name__.partition(".")[0]


def from_checkout(extra: str) -> str:
    """Return the command that installs nf4 with an extra."""
    return f"pip install '.[{extra}]' in a checkout of {_OWN}"


def missing(module: str) -> str:
    """Return what to say of a module that was to be imported and is not there.

    Args:
        module: its name; of a package whose name is that of its project.
    """
    package = module.partition(".")[0]
    if package == _OWN:
        return f"expected the module {module}, which this {_OWN} does not have: pip install . anew"
    return f"expected the package {package}, which is not installed: pip install {package}"
