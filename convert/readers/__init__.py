"""Readers of weight files: what they hold, checked before a byte of it is believed; no torch."""
