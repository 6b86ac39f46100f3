"""What the commands share: errors, options, devices, files, building a model, reading images."""
