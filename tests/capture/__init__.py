"""Tests of capture, against a hypervisor in memory."""
