"""The benchmarks: ``<op>_cases`` is what is measured, ``<op>_providers`` who; see ``registry``."""
