"""Programs around hvbackup: the demonstration, benchmarks, the lab guest and the independent reader."""
