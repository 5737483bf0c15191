"""Where the program runs: TensorFlow, the machine, the terminal, the command line."""
