"""The commands, a module each: ``run(args, show)`` returns the exit status."""
