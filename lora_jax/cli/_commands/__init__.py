"""The commands, one module each.

A module has ``EXAMPLE``, the words of its help's example; ``arguments(parser)``, which declares
what can be passed; and ``run(args, show)``, which returns the exit status. It is imported when the
command is called.
"""

SUMMARIES = {
    "inspect": "show what an adapter or a model holds",
    "merge": "merge adapters into a model's files, one tensor at a time",
    "convert": "convert an adapter, or a model, to another format",
    "diff": "compare two adapters, or two models: exit status 0 if equal, 1 if not",
    "extract": "find the LoRA that comes nearest to what fine-tuning changed",
    "verify": "check whether an adapter is for a model: exit status 0 if it is, 1 if not",
    "completion": "print the completion script of a shell",
}
