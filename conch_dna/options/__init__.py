"""Options: settings that know their help and range, and the commands that take them."""
