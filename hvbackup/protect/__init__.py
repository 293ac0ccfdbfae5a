"""Continuous protection: a machine's moments go into its journal for as long as it is told to.

A life of protection begins with a point that the journal's facts are laid over, and ends when something breaks: the host is gone,
a bitmap is lost, the journal's disk is full.  The next one goes on from the newest barrier where its checkpoints still prove what
changed since; where they don't, it begins with a capture, which compares what it must.  Either way the journal says from when to
when nothing was recorded.

events       what happens to a machine under protection, and the rhythm in which it should
marks        names that wait for their moment
setting      what all lives of one machine have in common
life         what every kind of life is able to do
beginning    how a life begins: resumed from the newest barrier, or with a capture
cycles       a life in micro-snapshots
streaming    a life in single writes; looks sees to it that none goes past us
rings        what dead workers of streams left: it follows what the journal has
samples      what is read again although it is said to be unchanged: trackers can lie
journaling   a recorder on a thread of its own: a slow disk is noticed, and never waited for
meeting      several machines at one moment; group lets them meet now and then
points       points made of moments, and room made in the journal
protection   one life after the other, until told to end

Importing this package costs nothing; import the classes from their modules.
"""
