"""Tests of megatron_lance."""
