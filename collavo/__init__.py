"""CoLLaVO: the Crayon Large Language and Vision mOdel, its processor, trainer and command line."""

from collavo_kernels import __version__

__all__ = ["__version__"]
