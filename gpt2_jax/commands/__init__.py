"""The command lines, one file per command: each parses its arguments, calls the library and prints.

`_command` has what they share. Arguments are parsed before JAX is imported, so `--help` and wrong arguments answer
quickly. So no module here imports JAX at its top, directly or indirectly. No module outside this package imports a
command.
"""
