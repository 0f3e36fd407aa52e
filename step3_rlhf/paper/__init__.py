"""Reproduces the paper's figures and tables; nothing else imports it."""
