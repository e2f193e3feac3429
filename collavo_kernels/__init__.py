"""Fast, exact kernels for vision-language models that see objects."""

from collavo_kernels._flags import check

__version__ = "0.1.0"

__all__ = ["__version__", "check"]
