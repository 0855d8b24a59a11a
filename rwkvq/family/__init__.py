"""A model family: a grid of models and policies, run as one."""
