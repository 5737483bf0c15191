"""What network and program share: defaults, errors, fast convolution, metadata of weights."""
