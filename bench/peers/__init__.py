"""The same settings in other libraries, each in an environment of its own."""
