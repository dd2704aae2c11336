"""Profiling: parameter counts and memory estimates."""
