"""The commands of ``dckt``, a module each: a thin wrapper on a function that applications call, too.

What is heavy (NumPy, runtimes, SQLite) is imported when a command runs, so that ``dckt --help`` is quick.
"""
