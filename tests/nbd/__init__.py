"""Tests of the NBD client and server."""
