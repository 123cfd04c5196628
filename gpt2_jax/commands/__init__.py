"""The command lines, one file a command: each parses its arguments, calls the library and prints.

`_command` is what they share. Arguments are parsed before JAX is imported, so that `--help` and a typo answer at once:
no module here imports at its top what imports JAX. Nothing else in the package imports a command.
"""
