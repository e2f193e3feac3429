"""Attention with the crayon inside: a module that takes a model's own attention over."""
