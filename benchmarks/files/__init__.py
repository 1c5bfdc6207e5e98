"""Networks that come as files alone, made smaller from file to file."""
