"""Prefect tasks: thin wrappers of the library's stages. Only file names and numbers travel between them."""
