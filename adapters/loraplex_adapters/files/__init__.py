"""An adapter as files: found, fetched, trusted, and described. It needs no torch: the service imports it."""
