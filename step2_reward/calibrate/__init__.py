"""Finds the β at which a reward model is calibrated; scripts/calibrate.sh runs it."""
