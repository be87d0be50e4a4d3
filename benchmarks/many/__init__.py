"""Measure many adapters over one base."""
