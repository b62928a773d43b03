"""The command line. The only part of `alignment` that knows the stages, and it imports them when they are called."""
