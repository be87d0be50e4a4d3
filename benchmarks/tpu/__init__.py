"""Compile for TPUs that are not there, and read what the programs take."""
