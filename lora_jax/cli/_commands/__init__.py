"""The commands, one module each.

A module has ``run(args, show)``, which returns the exit status. It is imported when the command is
called, so that help is there at once.
"""
