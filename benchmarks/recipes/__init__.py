"""Measure the trainer."""
