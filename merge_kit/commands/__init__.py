"""One module a command: options in, text out, no logic of its own."""
