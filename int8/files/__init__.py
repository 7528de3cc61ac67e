"""Files of this user alone: folders that nobody else can write to, the signing key, signed files, what a dead process has left behind.

Plain Python. What is loaded as code is read once, checked, and loaded from a fresh folder that the checked bytes were written to; so what
is loaded is what was checked, whatever happens to the file meanwhile.
"""
