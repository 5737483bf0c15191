"""What main.py dispatches to: a file for each mode.

In all of them `flags` are the values of the flags, `argv` is the command line, and `devices`,
`data` and `weights` are a Devices, a CommandData and a Weights. `report` takes a line for the user.
"""
