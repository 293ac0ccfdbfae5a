"""What QEMU mirrors a machine's writes to: a small program (`target.c`) that keeps each of them in a ring and answers at once.

    ring.py      the ring: a shared file on tmpfs that outlives every process of ours
    process.py   the program, as one worker runs it

Decision 0021 says why it is a program of its own, and in C.
"""
