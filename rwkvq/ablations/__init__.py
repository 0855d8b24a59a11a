"""The experiments of docs/method.md 13: which settings they compare, how a mix of two artifacts is measured, tables."""
