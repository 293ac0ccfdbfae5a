"""The service: keeps machines protected by itself.

systemd      what systemd is told: ready, alive, reloading
discovery    which machines sources have, asked in processes that may hang
watchers     what happens on hosts that tell of it
workers      one process for each machine under continuous protection, which outlives the service
tasks        what is due, as jobs
alarms       what is wrong now, and whom it was told
keeper       the loop around all of them
serve        the process: lock, signals, reload, API

Nothing here holds the store: captures, checks and protection are processes of their own, and each of them would run the same
from a shell.  So the service may be killed, restarted or upgraded at any moment, and nothing stops.
"""
