"""The companion of one rank: a small process that knows when its rank, another rank or the link between is gone.

Standard library only, to be small (6 MB of its own); started by ``trainers/watch.py``. Rank 0's companion is the
hub: the others connect to it, all send heartbeats, and it alone decides what went wrong first and tells everyone.
Each then prints one line, gives its rank a moment to leave, and kills it. A companion that no longer hears the hub
decides for itself. It never outlives its rank by more than seconds: the pipe between them closes.

Messages are JSON, one a line; an empty object is a heartbeat. Only time in which this process ran is counted, by the
monotonic clock: a machine that slept, or a job stopped and continued as a whole, accuses nobody.
"""
