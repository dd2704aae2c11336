"""Objectives: flow-matching noise and the two losses."""
