"""Ops: public functions with a plain-torch reference and a backend chosen once."""
