"""From a module's run to a forward pass: points, tape and hooks."""
