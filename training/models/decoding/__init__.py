"""Decoding, one token per step for all rows: a preallocated cache, and no wait for the device."""
