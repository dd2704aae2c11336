"""Parity with the public reference: golden cases and the comparison with them."""
