"""The command line, as people and programs use it: in processes of its own."""
