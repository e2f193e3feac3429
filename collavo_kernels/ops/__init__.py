"""The operators: a folder is an operator, a file in it is a backend."""
