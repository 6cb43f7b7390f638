"""Whether this machine is fit to run models: what `hobbit doctor` looks at."""
