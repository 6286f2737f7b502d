"""The command line and the public Python API of Cappy on Ray."""
