"""What a person starts: the command line, the demo, the server and the benchmarks."""
