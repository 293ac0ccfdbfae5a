"""The tests of hvbackup."""
