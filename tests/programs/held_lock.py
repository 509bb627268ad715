"""Hold a file's lock until a line comes in: held_lock.py FILE."""

import sys

import filelock

lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
input()
