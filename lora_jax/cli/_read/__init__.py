"""Recognize what a path holds, by its contents.

* ``path``: opens one; ``forms``: what it can be: an adapter's file, or a checkpoint.
* ``peft``: PEFT's files without the model.
* ``base``: the tree that an adapter is of; ``match``: names of one tree in another.
"""
