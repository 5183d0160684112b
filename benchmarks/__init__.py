"""Measurements of accuracy and speed. Not part of the distribution; run from a checkout by the targets of the Makefile."""
